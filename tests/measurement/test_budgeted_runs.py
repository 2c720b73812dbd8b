"""A budgeted run: a sample is drawn from estimates of all removals, measured, and is the same whenever it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from hooked_moe import HookedMoE, measurement
from hooked_moe.analysis.budgeted import analyse_budgeted, budgeted_fault
from hooked_moe.analysis.estimated_effects import BudgetedTables
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement import budget as timing
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.report import report_fault, write_report
from hooked_moe.tables import read_csv, required_file
from hooked_moe.tables.effect_grid import effect_chunks
from tests.support.number_text import number_corpus, number_reader

LENGTHS = (40, 25, 30, 22, 18, 33, 27, 20, 24, 31, 17, 29)
KEYS = ["document", "position", "layer", "slot"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Opens a run of one model and corpus, whose longer documents have several windows."""
    from tests.conftest import random_model

    model = number_reader(random_model, n_layers=2)
    corpus = number_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS)

    def open_run(results: Path, **options: Any) -> Run:
        return open_measurement(model, TokenizedCorpus(model, corpus, 16), results=results, **options)

    return open_run


@pytest.fixture(scope="module")
def budgeted(opened: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a third of the removals."""
    with opened(tmp_path_factory.mktemp("budgeted"), budget=Budget(share=0.3)) as run:
        run.require_sample(progress=False)
    return run


@pytest.fixture(scope="module")
def exhaustive(opened: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    with opened(tmp_path_factory.mktemp("exhaustive")) as run:
        run.require("position", progress=False)
    return run


def table(run: Run, name: str) -> pd.DataFrame:
    return pq.read_table(run.directory / f"{name}.parquet").to_pandas()


def test_what_was_drawn_is_what_the_exhaustive_table_says(budgeted: Run, exhaustive: Run) -> None:
    drawn, everything = table(budgeted, "sampled_effects"), table(exhaustive, "effects")
    both = drawn.merge(everything, on=[*KEYS, "expert"], suffixes=("", "_all"))
    assert len(both) == len(drawn) > 100
    np.testing.assert_allclose(both["delta_loss"], both["delta_loss_all"], atol=1e-5)
    np.testing.assert_allclose(both["kl"], both["kl_all"], atol=1e-5)
    assert drawn["inclusion_probability"].between(0, 1).all()


def test_estimates_are_the_exhaustive_table_without_its_effects(budgeted: Run, exhaustive: Run) -> None:
    estimates, everything = table(budgeted, "estimates"), table(exhaustive, "effects")
    assert set(everything.columns) - set(estimates.columns) == {"delta_loss", "kl"}
    pd.testing.assert_frame_equal(estimates, everything[estimates.columns], atol=1e-5, rtol=1e-4)


def test_the_draw_says_how_many_there_were_and_how_many_were_made(budgeted: Run, exhaustive: Run) -> None:
    draw, drawn, everything = table(budgeted, "draw"), table(budgeted, "sampled_effects"), table(exhaustive, "effects")
    assert draw["n_removals"].sum() == everything["delta_loss"].notna().sum()
    assert draw["n_drawn"].sum() == len(drawn)
    made = drawn.groupby(["layer", "expert"]).size()
    for row in draw.itertuples():
        assert made.get((row.layer, row.expert), 0) == row.n_drawn


def test_a_run_that_is_measured_again_has_the_same_bytes(
    opened: Callable[..., Run], budgeted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measurement.shards.measure_document
    left = 5

    def killed(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(measurement.shards, "measure_document", killed)
    for _ in range(20):  # a few documents at a time, through both parts
        left = 5
        with opened(tmp_path, budget=Budget(share=0.3)) as run:
            try:
                run.require_sample(progress=False)
                break
            except KeyboardInterrupt:
                continue
    assert run.has("sampled")
    for name in ("estimates", "sampled_effects", "draw", "tokens", "routing"):
        path = f"{name}.parquet"
        assert (run.directory / path).read_bytes() == (budgeted.directory / path).read_bytes()


def test_seconds_become_a_share_once(opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FEWEST_REMOVALS", 1)
    budget = Budget(seconds=60.0)
    with opened(tmp_path, budget=budget) as run:
        run.require_sample(progress=False)
    recorded = json.loads((run.directory / "manifest.json").read_text())["budget"]
    assert 0 < recorded["share"] <= 0.99
    assert recorded["seconds_per_removal"] > 0
    monkeypatch.setattr(measurement.run, "share_of", lambda *arguments: pytest.fail("timed twice"))
    with opened(tmp_path, budget=budget) as again:
        assert again.require_sample(progress=False).share == recorded["share"]


def test_too_few_seconds_are_refused_before_anything_is_measured(
    opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement.run, "measure_part", lambda *_, **__: pytest.fail("was measured"))
    with opened(tmp_path, budget=Budget(seconds=1e-6)) as run, pytest.raises(ValueError, match="too few: the forward passes"):
        run.require_sample(progress=False)


def test_a_share_of_too_few_removals_is_refused_before_anything_is_measured(
    opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sample without removals nothing could be analysed, and intervals of a handful say nothing."""
    monkeypatch.setattr(measurement.run, "measure_part", lambda *_, **__: pytest.fail("was measured"))
    said = r"0.1% of 1,824 removals are fewer than 200, which say nothing of a model: give a larger share"
    with opened(tmp_path, budget=Budget(share=0.001)) as run, pytest.raises(ValueError, match=said):
        run.require_sample(progress=False)


def test_memory_without_room_for_a_document_is_refused_before_verification(
    opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement.run, "verify_once", lambda *_, **__: pytest.fail("was verified"))
    with opened(tmp_path) as run, pytest.raises(ValueError, match=r"memory_budget \(--memory\) is 1,000 bytes, and the longest"):
        run.require("position", memory_budget="1KB", progress=False)


@pytest.mark.parametrize("streams", [False, True])
def test_the_time_of_reading_streamed_weights_counts_once_for_all_documents(
    budgeted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """By a clock that gives 100 s to each reading, 2 s to each window and 0.01 s to each removal."""
    model, clock = budgeted.model, 0.0
    if streams:
        budgeted.model.save_pretrained(tmp_path)
        model = HookedMoE.from_pretrained(tmp_path, stream=True)
        model.tokenizer = budgeted.model.tokenizer
    corpus = TokenizedCorpus(model, budgeted.tokenized.corpus, 16)

    def pretended(model: HookedMoE, tokens: torch.Tensor, *, picks: torch.Tensor, **options: Any) -> None:
        nonlocal clock
        clock += 100 * model.streams + 2 * len(tokens) + 0.01 * int(picks.sum())

    monkeypatch.setattr(timing, "expert_effects", pretended)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(timing, "FEWEST_REMOVALS", 1)
    settled = timing.share_of(Budget(seconds=150.0), model, corpus, (0, 1), "zero")
    longest = max(len(window.tokens) for windows in corpus.documents for window in windows)
    tokens = sum(len(window.tokens) for windows in corpus.documents for window in windows)
    fixed = 100 * streams + 2 * tokens / longest
    removals = len(corpus.valid_positions()) * 2 * model.cfg.experts_per_token
    assert settled["seconds_of_forwards"] == pytest.approx(fixed)
    assert settled["seconds_per_removal"] == pytest.approx(0.01)
    assert settled["share"] == pytest.approx(min(0.99, (150 - fixed) / 0.01 / removals), rel=1e-2)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1%", Budget(share=0.01)),
        ("0.5 %", Budget(share=0.005)),
        ("90s", Budget(seconds=90.0)),
        ("10min", Budget(seconds=600.0)),
        ("1.5h", Budget(seconds=5400.0)),
    ],
)
def test_a_budget_is_a_share_or_a_time(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "1", "0%", "100%", "-1%", "1e3%", "nan%", "10 minutes", "0s", "%", "1%2%"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"share of the removals|number of seconds"):
        Budget.parse(text)


@pytest.mark.parametrize("wrong", [{"share": "a"}, {"share": True}, {"seconds": "10"}])
def test_a_budget_is_a_number(wrong: dict[str, Any], unchecked: None) -> None:
    with pytest.raises(TypeError, match="must be a number, not"):
        Budget(**wrong)


@pytest.mark.parametrize(("options", "part"), [({"budget": Budget(share=0.1)}, "position"), ({}, "estimates"), ({}, "sampled")])
def test_a_run_measures_a_sample_or_everything_and_not_both(
    options: dict[str, Any], part: Any, opened: Callable[..., Run], tmp_path: Path
) -> None:
    with opened(tmp_path, **options) as run, pytest.raises(ValueError, match=f"part '{part}' is of a run with"):
        run.require(part)


def test_runs_with_and_without_a_budget_have_directories_of_their_own(budgeted: Run, exhaustive: Run) -> None:
    assert budgeted.directory.name != exhaustive.directory.name
    assert "budget" not in exhaustive.plan["measurement"]
    assert budgeted.plan["measurement"]["budget"] == {"share": 0.3, "seed": 42}


def test_nothing_that_reads_effects_takes_a_sample_for_them(budgeted: Run) -> None:
    with pytest.raises(FileNotFoundError, match="this is a budgeted run"):
        required_file(budgeted.directory, "effects.parquet", "the measurement writes it")
    for name in ("sampled_effects", "estimates"):
        with pytest.raises(ValueError):  # noqa: PT011 (one lacks a column, the other is no grid)
            list(effect_chunks(budgeted.directory / f"{name}.parquet"))


def test_a_streamed_model_draws_and_measures_the_same(opened: Callable[..., Run], budgeted: Run, tmp_path: Path) -> None:
    budgeted.model.save_pretrained(tmp_path / "model")
    streamed = HookedMoE.from_pretrained(tmp_path / "model", stream=True)
    streamed.tokenizer = budgeted.model.tokenizer
    corpus = TokenizedCorpus(streamed, budgeted.tokenized.corpus, 16)
    with open_measurement(streamed, corpus, results=tmp_path, budget=Budget(share=0.3)) as run:
        run.require_sample(progress=False)
    pd.testing.assert_frame_equal(table(run, "draw"), table(budgeted, "draw"))
    pd.testing.assert_frame_equal(table(run, "sampled_effects"), table(budgeted, "sampled_effects"), atol=1e-5)


# --- what is made of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(budgeted: Run) -> Run:
    analyse_budgeted(budgeted.directory, n_experts=budgeted.model.cfg.num_experts)
    return budgeted


def test_intervals_hold_what_all_removals_say(analysed: Run, exhaustive: Run) -> None:
    rows = read_csv(analysed.directory / "budgeted.csv").to_pandas()
    everything = table(exhaustive, "effects").dropna(subset=["delta_loss"])
    for effect in ("delta_loss", "kl"):
        own = rows[(rows["effect"] == effect) & (rows["kind"] == "layer")]
        truth = {"all": everything[effect].mean(), **{str(k): v for k, v in everything.groupby("layer")[effect].mean().items()}}
        assert set(own["layer"]) == set(truth)
        experts = rows[(rows["effect"] == effect) & (rows["kind"] == "expert")]
        by_expert = everything.groupby(["layer", "expert"])[effect].mean()
        assert len(experts) == len(by_expert)
        held = [
            low <= by_expert[int(layer), int(name)] <= high
            for layer, name, low, high in zip(
                experts["layer"], experts["name"], experts["sampling_low"], experts["sampling_high"], strict=True
            )
        ]
        assert np.mean(held) > 0.8
        inside = [row.sampling_low <= truth[row.layer] <= row.sampling_high for row in own.itertuples()]
        assert np.mean(inside) > 0.5
        assert (rows["low"] < rows["estimate"]).any()


def test_a_sample_of_everything_is_everything(opened: Callable[..., Run], exhaustive: Run, tmp_path: Path) -> None:
    with opened(tmp_path, budget=Budget(share=0.999)) as run:
        run.require_sample(progress=False)
    estimated = np.concatenate([chunk.effects.kl.ravel() for chunk in BudgetedTables(run.directory).chunks()])
    exact = table(exhaustive, "effects")["kl"].dropna().to_numpy()
    assert np.quantile(np.abs(estimated - exact), 0.99) < 1e-3


def test_tables_of_two_runs_are_not_read_as_one(analysed: Run, opened: Callable[..., Run], tmp_path: Path) -> None:
    with opened(tmp_path, budget=Budget(share=0.2)) as run:
        run.require_sample(progress=False)
    other = run.directory / "draw.parquet"
    other.write_bytes((analysed.directory / "draw.parquet").read_bytes())
    with pytest.raises(ValueError, match="not of one run"):
        analyse_budgeted(run.directory, n_experts=run.model.cfg.num_experts)


def test_the_page_says_that_it_is_budgeted(analysed: Run) -> None:
    assert budgeted_fault(analysed.directory, n_experts=analysed.model.cfg.num_experts) is None
    page = write_report(analysed.directory).read_text()
    made = len(table(analysed, "sampled_effects"))
    assert "A budgeted audit." in page
    assert f"{made:,} of " in page
    assert "What the budget bought" in page
    assert "How well a ranking orders experts" not in page
    assert "a sample of the removals cannot tell it" in page
    assert "leave out --budget" in page
    assert "compare-runs" not in page, "which takes all removals"
    assert report_fault(analysed.directory) is None
