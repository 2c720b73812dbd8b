"""A run measures each part once, on demand, for one writer, and says how much of it has been measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from hooked_moe import HookedMoE, measurement
from hooked_moe.checks import pairs_of_numbers
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.measurement import Run, gate, measured_positions, open_measurement
from hooked_moe.measurement.part_spec import PartSpec
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from tests.support.number_text import number_corpus, number_reader

LENGTHS = (12, 9)
SOME, OTHERS = [(0, 1), (0, 5), (1, 3)], [(0, 5), (1, 0)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Opens the run of one model and corpus in a directory of results."""
    from tests.conftest import random_model

    model = number_reader(random_model, n_layers=2)
    corpus = number_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS)

    def open_run(results: Any, **options: Any) -> Run:
        return open_measurement(model, TokenizedCorpus(model, corpus, 8), results=results, **options)

    return open_run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[PartSpec]:
    """The parts that are measured, in order."""
    asked: list[PartSpec] = []
    original = measurement.run.measure_part

    def recorded(model: HookedMoE, corpus: TokenizedCorpus, spec: PartSpec, *rest: Any, **options: Any) -> None:
        asked.append(spec)
        original(model, corpus, spec, *rest, **options | {"progress": False})

    monkeypatch.setattr(measurement.run, "measure_part", recorded)
    return asked


@pytest.fixture
def run(opened: Callable[..., Run], tmp_path: Path) -> Iterator[Run]:
    with opened(tmp_path) as run:
        yield run


def table(run: Run, name: str) -> pd.DataFrame:
    return pq.read_table(run.directory / f"{name}.parquet").to_pandas()


def test_each_part_is_measured_once_and_reopening_finds_it(
    opened: Callable[..., Run], measured: list[PartSpec], tmp_path: Path
) -> None:
    for _ in range(2):
        with opened(tmp_path) as run:
            run.require("position")
            run.require("sequence", SOME)
            run.require("progressive", SOME, layers=[1], orders=["random"], seed=3)
            run.require("position", SOME)
    assert [spec.part for spec in measured] == ["position", "sequence", "progressive"]
    parts = json.loads((run.directory / "manifest.json").read_text())["parts"]
    assert parts["position"] == {"layers": [0, 1], "positions": "all"}
    assert (parts["sequence"]["positions"], parts["progressive"]["orders"], parts["progressive"]["seed"]) == (3, ["random"], 3)
    names = {path.name for path in run.directory.iterdir()}
    tables = {"effects", "tokens", "token_texts", "routing", "expert_weights", "documents", "effects_sequence", "progressive"}
    assert names == {f"{name}.parquet" for name in tables} | {"plan.json", "manifest.json", "writer.lock"}


def test_more_positions_are_measured_along_with_those_there_were(run: Run, measured: list[PartSpec]) -> None:
    effects = run.directory / "effects.parquet"
    run.require("position", SOME)
    assert measured_positions(effects) == set(SOME)
    run.require("position", SOME[:1])
    run.require("position", OTHERS)
    assert measured_positions(effects) == {*SOME, *OTHERS}
    run.require("position", SOME + OTHERS)
    run.require("position", run.tokenized.valid_positions())
    run.require("position")
    assert [spec.positions for spec in measured] == [frozenset(SOME), frozenset(SOME + OTHERS), None]
    assert measured_positions(effects) == set(run.tokenized.valid_positions())


def test_more_orders_and_layers_are_measured_along_with_those_there_were(run: Run, measured: list[PartSpec]) -> None:
    run.require("progressive", SOME, layers=[1], orders=["random"])
    run.require("progressive", SOME, layers=[0], orders=["descending"])
    run.require("progressive", SOME, orders=["random"])
    assert [(spec.layers, spec.orders) for spec in measured] == [
        ((1,), ("random",)),
        ((0, 1), ("descending", "random")),
    ]
    rows = table(run, "progressive")
    assert len(rows) == len(SOME) * 2 * 2 * 3
    with pytest.raises(ValueError, match="random orders of seed 0, not 1"):
        run.require("progressive", SOME, seed=1)


def test_the_same_positions_twice_give_the_same_numbers(run: Run) -> None:
    run.require("position", SOME, progress=False)
    before = table(run, "effects").dropna()
    run.require("position", progress=False)
    after = table(run, "effects").merge(before[["document", "position", "layer", "slot"]])
    pd.testing.assert_frame_equal(after, before.reset_index(drop=True), atol=2e-6, rtol=1e-4)


def test_one_removal_of_one_expert_is_where_progressive_removal_begins(run: Run) -> None:
    run.require("position", progress=False)
    run.require("progressive", orders=["descending", "ascending"], progress=False)
    effects, rows = table(run, "effects").dropna(), table(run, "progressive")
    for order, slot in (("descending", 0), ("ascending", 2)):
        first = rows[(rows["order"] == order) & (rows["removed"] == 1)].set_index(["document", "position", "layer"])
        alone = effects[effects["slot"] == slot].set_index(["document", "position", "layer"])
        pd.testing.assert_series_equal(first["delta_loss"], alone["delta_loss"], atol=2e-6, rtol=0)


def test_a_second_writer_is_turned_away_until_the_first_is_done(opened: Callable[..., Run], tmp_path: Path) -> None:
    with opened(tmp_path) as run, pytest.raises(BlockingIOError, match="is being written by another process"):
        opened(tmp_path)
    with opened(tmp_path, name="elsewhere") as other:
        assert other.directory != run.directory
    opened(tmp_path).close()


def test_a_failure_to_open_leaves_the_run_unlocked(opened: Callable[..., Run], tmp_path: Path) -> None:
    opened(tmp_path, name="run").close()
    with pytest.raises(ValueError, match="run was begun with another measurement"):
        opened(tmp_path, name="run", removal="reroute")
    opened(tmp_path, name="run").close()


def test_scopes_are_verified_before_they_are_measured_and_only_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], gate.verify

    def recorded(*inputs: Any, **options: Any) -> Steps[Any]:
        asked.append(inputs[-1])
        return (yield from original.steps(*inputs, **options))

    monkeypatch.setattr(gate, "verify", pausable(recorded))
    run.require("progressive", SOME, progress=False)
    run.require("position", SOME, progress=False)
    run.require("sequence", SOME, progress=False)
    run.require("sequence", progress=False)
    assert asked == [("position",), ("sequence",)]
    names = [check["name"] for check in run.manifest["verification"]]
    assert names[-2:] == ["effects are exact", "effects are exact, sequence-wide"]
    assert len(set(names)) == len(names)


def test_a_streamed_run_takes_up_one_in_memory_and_the_other_way_round(
    make_model: Callable[..., HookedMoE], measured: list[PartSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(n_layers=2, model_type="olmoe").save_pretrained(tmp_path / "model")
    corpus = number_corpus(tmp_path, LENGTHS)

    def opened(stream: bool) -> Run:
        model = number_reader(lambda: HookedMoE.from_pretrained(tmp_path / "model", stream=stream))
        return open_measurement(model, TokenizedCorpus(model, corpus, 8), results=tmp_path / "results", name="run")

    with opened(stream=True) as run:
        run.require("position", SOME)
        rows = table(run, "effects").dropna(subset="delta_loss")
        assert rows[["first_order", "first_order_curved"]].notna().all(axis=None)
    with opened(stream=False) as run:
        run.require("position", SOME)  # all there
        run.require("position", OTHERS)
    with opened(stream=True) as run:
        run.require("position", OTHERS)  # all there
        run.require("sequence", SOME)
    assert [spec.part for spec in measured] == ["position", "position", "sequence"]


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("tokens", {}, "part must be one of 'position', 'sequence', 'progressive', 'estimates', 'sampled', not 'tokens'"),
        ("position", {"positions": [(0, 11)]}, r"positions \[\(0, 11\)\] have no next token"),
        ("position", {"positions": []}, "no positions to measure: positions is empty"),
        ("progressive", {"orders": ["upwards"]}, r"orders must be some of .* not \('upwards',\)"),
        ("progressive", {"orders": []}, "orders must be some of"),
        ("progressive", {"layers": [0, 2]}, r"layers \[2\] are not of this run, which measures \[0, 1\]"),
        ("progressive", {"layers": []}, "are not of this run"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Run, measured: list[PartSpec], part: Any, options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        run.require(part, **options)
    assert not measured


def test_layers_without_experts_are_refused(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    model = number_reader(make_model, architecture="qwen")
    tokenized = TokenizedCorpus(model, number_corpus(tmp_path, LENGTHS), 8)
    for layers in ([0, 1], []):
        with pytest.raises(ValueError, match=r"have no experts to remove; layers \[0, 2\] have"):
            open_measurement(model, tokenized, layers, results=tmp_path)


# Numbers and containers


@pytest.mark.usefixtures("unchecked")
def test_positions_layers_and_orders_are_read_once_and_as_numbers() -> None:
    pairs = [(0, 1), (1, 2)]
    forms: list[Callable[[], Any]] = [
        lambda: torch.tensor(pairs),
        lambda: np.array(pairs, dtype=np.int32),
        lambda: map(list, pairs),
        lambda: ((torch.tensor(document), np.int64(position)) for document, position in pairs),
        lambda: dict.fromkeys(pairs).keys(),
    ]
    for form in forms:
        assert pairs_of_numbers(form(), "positions", "(document, position)") == pairs
    for wrong in ([(0, 1.5)], [(0, True)], [0, 1], [(0, 1, 2)], torch.tensor([0, 1]), torch.ones(2, 2), None, {0: 1}, iter(())):
        with pytest.raises(ValueError, match=r"^positions (must be|is an iterator that yields nothing)"):
            pairs_of_numbers(wrong, "positions", "(document, position)")


@pytest.mark.usefixtures("unchecked")
def test_a_run_takes_orders_from_an_iterator_and_numbers_from_arrays(
    make_model: Callable[..., HookedMoE], tmp_path: Path
) -> None:
    """Orders were looked at twice: from a generator, none were left to measure."""
    model, corpus = number_reader(make_model, n_layers=2), number_corpus(tmp_path, LENGTHS)
    tokenized = TokenizedCorpus(model, corpus, n_ctx=np.int64(8), limit=torch.tensor(10))
    with open_measurement(model, tokenized, layers=torch.tensor([1]), results=tmp_path) as run:
        sample = np.array(SOME)
        orders = (order for order in ("descending", "random"))
        run.require("progressive", sample, layers=np.array([1]), orders=orders, seed=np.int64(3), progress=False)
        recorded = run.manifest["parts"]["progressive"]
        assert (recorded["orders"], recorded["seed"], recorded["layers"]) == (["descending", "random"], 3, [1])
        with pytest.raises(ValueError, match="orders must be some of"):
            run.require("progressive", sample, orders=iter(()), progress=False)
    for wrong in (torch.tensor([1.0]), [True], 1):
        with pytest.raises(ValueError, match="layers must be"):
            open_measurement(model, tokenized, layers=wrong, results=tmp_path)
    for wrong in (8.0, True):
        with pytest.raises(ValueError, match="n_ctx must be a whole number"):
            TokenizedCorpus(model, corpus, n_ctx=wrong)
    with pytest.raises(ValueError, match="expected a corpus, as load_corpus"):
        TokenizedCorpus(model, "held-out", n_ctx=8)
    with pytest.raises(ValueError, match=r"expected a TokenizedCorpus\(model, corpus, n_ctx\), not Corpus"):
        open_measurement(model, corpus, results=tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_results_go_to_a_directory_however_it_is_given(opened: Callable[..., Run], tmp_path: Path) -> None:
    with opened(str(tmp_path)) as named, opened(tmp_path, name="other") as path:
        assert named.directory.parent == path.directory.parent
    with pytest.raises(ValueError, match="results must be a directory, as in results='results', not 3"):
        opened(3)
