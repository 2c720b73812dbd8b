"""`hooked-moe prune` as a user runs it: its tables against slow sums, what it resumes, what it saves, what it refuses."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from hooked_moe import HookedMoE, tables
from hooked_moe.analysis import predict_pruning
from hooked_moe.analysis.pruning_orders import ORACLES, RANKINGS, TABLE, PruningOrders
from hooked_moe.analysis.pruning_table import PRUNING
from hooked_moe.cli import paper, prune
from hooked_moe.measurement import Run, pruned_losses
from hooked_moe.report.figures.drawing import Drawing
from tests.support.hf_models import logits_of
from tests.support.number_text import number_reader, token_ids, write_corpus

LENGTHS = (14, 16, 15, 9, 30, 16, 12, 40, 16, 16)  # the odd documents are 1, 3, 5, 7, 9
EXPERTS, LAYERS, ACTIVE = 6, 2, 3
TOKENS = 20
SMALL = ("--shares", "0.34", "--criteria", "reap", "utilization_rate", "mean_effect", "table", "--random", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def workplace(home: Path, make_model: Callable[..., HookedMoE], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, a corpus, and a run that is pruned once; figures are drawn as empty pictures."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    if not (home / "model").exists():
        number_reader(make_model, n_layers=LAYERS, n_ctx=16, d_head=8).save_pretrained(home / "model")
        write_corpus(home / "corpus.jsonl", LENGTHS)
        assert run_prune(*SMALL) == 0
    return home


def run_prune(*more: str) -> int:
    settings = ["--model", "model", "--corpus", "corpus.jsonl", "--tokens", "all", "--run", "run"]
    return prune.main([*settings, "--evaluate-tokens", str(TOKENS), *more])


def written(home: Path, name: str = "pruning.csv") -> list[dict[str, Any]]:
    schema = PRUNING if name == "pruning.csv" else None
    return tables.read_csv(home / "results" / "model" / "run" / name, schema).to_pylist()


def effects_of(home: Path) -> Any:
    table = pq.read_table(home / "results" / "model" / "run" / "effects.parquet").to_pandas()
    return table[table["document"] % 2 == 0]


def removed_by(home: Path, ranking: str, share: float = 0.34) -> dict[int, list[int]]:
    return PruningOrders(home / "results" / "model" / "run", EXPERTS, "even").prune(ranking, share, "layer").experts


def slow_rise(home: Path, experts: dict[int, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the summed loss and number of predictions of each odd document, one window at a time."""
    model = HookedMoE.from_pretrained(home / "model")
    losses = []
    for pruned in (False, True):
        if pruned:
            model.remove_experts(experts)
        by_document = []
        for document in range(1, len(LENGTHS), 2):
            tokens, total, n = token_ids(LENGTHS[document], document)[:TOKENS], 0.0, 0
            for start in range(0, len(tokens) - 1, 15):  # windows of 16 share a token with the next
                window = torch.tensor([tokens[start : start + 16]])
                with torch.no_grad():
                    loss = model(window, return_type="loss", loss_per_token=True)
                total, n = total + float(loss.sum()), n + loss.numel()
            by_document.append((total, n))
        losses.append(by_document)
    before, after = np.array(losses)
    return after[:, 0] - before[:, 0], before[:, 1]


# --- what it writes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["reap", "random_1", "table"])
def test_the_rise_is_that_of_a_checkpoint_without_the_experts_on_documents_that_chose_nothing(workplace, ranking):
    rise, n = slow_rise(workplace, removed_by(workplace, ranking))
    (row,) = [row for row in written(workplace) if row["ranking"] == ranking]
    assert (row["n_documents"], row["n_tokens"], row["share"], row["per"]) == (5, TOKENS, 0.34, "layer")
    assert n.sum() == sum(min(LENGTHS[document], TOKENS) - 1 for document in range(1, 10, 2))
    assert row["rise"] == pytest.approx(rise.sum() / n.sum(), abs=1e-5)
    assert row["rise_low"] < row["rise"] < row["rise_high"]


@pytest.mark.parametrize("ranking", ["utilization_rate", "random_0", "mean_effect"])
def test_the_prediction_is_the_sum_over_removals_in_the_even_documents(workplace, ranking):
    experts, frame = removed_by(workplace, ranking), effects_of(workplace).dropna(subset=["delta_loss"])
    n = len(frame[["document", "position"]].drop_duplicates())
    gone = np.array([expert in experts[layer] for layer, expert in zip(frame["layer"], frame["expert"], strict=True)])
    (row,) = [row for row in written(workplace) if row["ranking"] == ranking]
    for effect in ("kl", "delta_loss"):
        assert row[f"predicted_{effect}"] == pytest.approx(frame[effect][gone].astype(float).sum() / n, rel=1e-5)
    assert row["predicted"] == row["predicted_kl"]
    assert row["predicted_low"] < row["predicted"] < row["predicted_high"]


def test_random_masks_are_what_costs_are_shares_of_and_reap_what_they_are_compared_with(workplace):
    rows = {row["ranking"]: row for row in written(workplace)}
    assert [(name, row["kind"], row["seed"]) for name, row in rows.items()] == [
        ("utilization_rate", "criterion", None),
        ("reap", "criterion", None),
        ("mean_effect", "oracle", None),
        ("table", "table", None),
        ("random_0", "random", 0),
        ("random_1", "random", 1),
    ]
    random = (rows["random_0"]["rise"] + rows["random_1"]["rise"]) / 2
    for name, row in rows.items():
        assert row["random_rise"] == pytest.approx(random)
        assert row["share_of_random"] == pytest.approx(row["rise"] / random)
        if name == "reap":
            assert np.isnan(row["less_reap"])
        else:
            assert row["less_reap"] == pytest.approx(row["rise"] - rows["reap"]["rise"])


def test_the_summary_says_how_well_predictions_did(workplace):
    criteria, masks = written(workplace, "pruning_summary.csv")
    assert (criteria["population"], masks["population"]) == ("criteria", "random masks")
    rows = [row for row in written(workplace) if row["kind"] == "criterion"]
    assert criteria["ratio"] == pytest.approx(np.median([row["rise"] / row["predicted"] for row in rows]))
    assert np.isnan(criteria["spearman"])  # of two criteria
    assert 0 <= criteria["coverage"] <= 1
    assert "What a pruning will cost" in (workplace / "results" / "model" / "run" / "report.html").read_text()
    note = predict_pruning(workplace / "results" / "model" / "run", {0: [1]}).note
    assert "no pruning.csv" not in note


# --- what it chooses by ------------------------------------------------------------------------------------------------------


def test_criteria_are_of_the_even_documents_alone_and_in_their_published_direction(workplace):
    frame = effects_of(workplace)
    frame = frame.assign(gap=frame["routing_weight"].astype(float) * frame["output_norm"].astype(float))
    for layer, removed in removed_by(workplace, "reap").items():
        means = frame[frame["layer"] == layer].groupby("expert")["gap"].mean().reindex(range(EXPERTS))
        assert removed == sorted(means.fillna(-1).sort_values().index[:2])
    table = pq.read_table(workplace / "results" / "model" / "run" / "experts.parquet").to_pandas()  # of weights: no half
    for layer, removed in removed_by(workplace, "aimer").items():
        highest = table[table["layer"] == layer].set_index("expert")["aimer"].sort_values(ascending=False).index[:2]
        assert removed == sorted(highest)
    measured = frame.dropna(subset=["delta_loss"])
    for estimate in ("first_order", "first_order_curved"):
        for layer, removed in removed_by(workplace, estimate).items():
            sums = measured[measured["layer"] == layer].groupby("expert")[estimate].sum().reindex(range(EXPERTS)).fillna(0)
            assert removed == sorted(sums.sort_values().index[:2])


def test_every_ranking_prunes_as_many_and_a_budget_for_the_model_leaves_enough(workplace):
    orders = PruningOrders(workplace / "results" / "model" / "run", EXPERTS, "even")
    for name in (*RANKINGS, "random_7"):
        each = orders.prune(name, 0.34, "layer").experts
        assert {layer: len(removed) for layer, removed in each.items()} == {0: 2, 1: 2}
        together = orders.prune(name, 0.34, "model").experts
        assert sum(map(len, together.values())) == 4
        assert max(map(len, together.values())) <= EXPERTS - ACTIVE
    assert {*ORACLES, TABLE} < {*RANKINGS}
    assert orders.prune("random_1", 0.34, "layer").experts != orders.prune("random_2", 0.34, "layer").experts


# --- what it resumes ---------------------------------------------------------------------------------------------------------


def test_a_pruning_is_measured_once_and_earlier_ones_stay_in_the_table(workplace, monkeypatch):
    path = workplace / "results" / "model" / "run" / "pruning.csv"
    assert run_prune(*SMALL) == 0
    before = path.read_text().splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(pruned_losses, "without_experts", lambda *_: pytest.fail("measured again"))
        assert run_prune(*SMALL) == 0
    assert path.read_text().splitlines() == before
    assert run_prune("--shares", "0.34", "--criteria", "weighted_ean", "--random", "1") == 0
    after = path.read_text().splitlines()
    assert [line for line in after if "weighted_ean" not in line] == before
    assert len(after) == len(before) + 1


def test_fewer_documents_do_not_take_the_place_of_more(workplace, capsys):
    path = workplace / "results" / "model" / "run" / "pruning.csv"
    assert run_prune(*SMALL) == 0
    before = path.read_bytes()
    assert run_prune(*SMALL, "--evaluate", "3") == 0
    assert path.read_bytes() == before
    assert run_prune(*SMALL, "--evaluate-tokens", "10", "--evaluate", "3") == 0
    assert "it is replaced" in capsys.readouterr().out
    assert {(row["n_documents"], row["n_tokens"]) for row in written(workplace)} == {(3, 10)}
    assert (
        run_prune(*SMALL, "--evaluate-tokens", "10", "--criteria", "weighted_ean") == 0
    )  # on all documents now, and so the others
    assert {(row["n_documents"], row["n_tokens"]) for row in written(workplace)} == {(5, 10)}
    assert {"reap", "weighted_ean", "random_1"} < {row["ranking"] for row in written(workplace)}
    assert run_prune(*SMALL) == 0
    assert {(row["n_documents"], row["n_tokens"]) for row in written(workplace)} == {(5, TOKENS)}


def test_a_killed_command_keeps_what_it_measured(workplace, monkeypatch):
    """At the third pruning the plug is pulled: the same command measures only what is not there."""
    asked = ("--shares", "0.5", "--criteria", "reap", "utilization_rate", "--random", "2")
    directory = workplace / "results" / "model" / "run" / "prunings"
    original, n_before = pruned_losses.MeasurePrunings._measured, len(list(directory.iterdir()))
    calls = []

    def unplugged(self, model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(pruned_losses.MeasurePrunings, "_measured", unplugged)
    assert run_prune(*asked) == 130
    kept = len(list(directory.iterdir()))
    assert n_before + 2 * 2 <= kept == n_before + 2 * (len(calls) - 1)  # a table and its record
    assert run_prune(*asked) == 0
    assert len(list(directory.iterdir())) == n_before + 2 * (len(calls) - 1)


def test_a_file_of_another_pruning_is_set_aside_and_measured_again(workplace, capsys):
    directory = workplace / "results" / "model" / "run" / "prunings"
    shutil.rmtree(directory)
    assert run_prune(*SMALL) == 0  # so that every file there is one that this command asks for
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    one, other = sorted(directory.glob("*.json"))[:2]
    one.write_bytes(other.read_bytes())
    assert run_prune(*SMALL) == 0
    assert f"{one.name} is of another measurement" in capsys.readouterr().out
    assert one.with_name(f"{one.name}.damaged").read_bytes() == other.read_bytes()
    for path in directory.glob("*.damaged"):
        path.unlink()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


# --- what it saves -----------------------------------------------------------------------------------------------------------


def test_the_saved_model_loads_in_transformers_and_has_learned_from_all_documents(workplace, tmp_path, capsys):
    assert run_prune("--save", str(tmp_path / "pruned"), "--criterion", "reap", "--shares", "0.34") == 0
    assert "forecast of the loss" in capsys.readouterr().out
    expected = HookedMoE.from_pretrained(workplace / "model")
    experts = PruningOrders(workplace / "results" / "model" / "run", EXPERTS, None).prune("reap", 0.34, "layer").experts
    expected.remove_experts(experts)
    tokens = torch.tensor([token_ids(16, 99)])
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(logits_of(reference.eval(), tokens), expected(tokens), atol=5e-5, rtol=0)
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "pruned")(tokens), expected(tokens))


def test_unequal_numbers_are_not_saved(workplace, tmp_path, capsys):
    options = ("--save", str(tmp_path / "pruned"), "--criterion", "utilization_rate", "--shares")
    refused = [run_prune(*options, share, "--per", "model") for share in ("0.09", "0.25")]  # one expert; three
    assert refused == [1, 1]
    assert "transformers loads checkpoints with one number for all layers only: give --per layer" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()


# --- what it refuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--criteria", "reip"), "unknown ranking 'reip'"),
        (("--criteria", "reip"), "did you mean 'reap'"),
        (("--shares", "1.5"), "--shares 1.5: give the part of the experts to remove, between 0 and 1"),
        (("--shares", "0.01"), "a share of 0.01 is 0 of a layer's 6 experts, and a token goes to 3"),
        (("--shares", "0.9"), "give a share that removes from 1 to 3"),
        (("--random", "0"), "--random 0: one mask at random is the least"),
        (("--evaluate-tokens", "1"), "--evaluate-tokens 1: a loss takes two tokens or more"),
        (("--evaluate", "2"), "--evaluate 2: an interval over documents takes 3 of them or more"),
        (("--documents", "4", "--run", "four"), "2 documents to measure on: rankings come from the even documents"),
        (("--save", "there"), "--save DIR and --criterion NAME go together"),
        (("--criterion", "reap"), "--save DIR and --criterion NAME go together"),
        (("--save", "there", "--criterion", "reap"), "--save writes one model: give one --shares"),
    ],
)
def test_bad_input_is_answered_before_anything_is_measured(workplace, options, message, capsys, monkeypatch):
    monkeypatch.setattr(Run, "require", lambda *_, **__: pytest.fail("was measured"))
    assert run_prune(*options) == 1
    assert message.lower() in capsys.readouterr().err.lower()


# --- its part in `hooked-moe paper` -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "planned"), [(None, True), (6, True), (5, False)])
def test_the_paper_prunes_where_there_are_documents_enough(documents, planned, monkeypatch):
    asked = []
    monkeypatch.setattr(prune, "prune", asked.append)
    args = argparse.Namespace(corpus="held-out", documents=documents, results=Path("results"), positions=20)
    steps = {title: (command, arguments) for title, command, arguments in paper.steps(args, "tiny-olmoe")}
    assert ("pruning" in steps) == planned
    if planned:
        command, arguments = steps["pruning"]
        assert command(arguments) == 0
        prune.check_options(asked[0])
        assert (asked[0].shares, asked[0].random, asked[0].documents) == ([0.25], 2, documents)
        assert list(steps).index("audit") < list(steps).index("pruning")


def test_options_have_their_defaults_where_another_library_gives_every_object_a_save(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As nnsight does once it is imported; argparse sets no default where there is an attribute of that name."""
    monkeypatch.setattr(argparse.Namespace, "save", lambda self: self, raising=False)
    assert prune.main(["--shares", "1.5"]) == 1
    assert "--shares 1.5: give the part of the experts to remove" in capsys.readouterr().err
