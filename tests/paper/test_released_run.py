"""Runs of the released protocol: what they measure, what they leave behind, how they resume; and the scripts around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch

from hooked_moe import ExpertMask, HookedMoE, HookPoint
from hooked_moe import statistics as stat
from hooked_moe.cli import audit, measured_run, progressive, redistribution
from hooked_moe.cli import compare as compare_published
from hooked_moe.cli import control as routing_weight_control
from hooked_moe.cli.released_run import released_positions
from hooked_moe.corpus import Corpus, Document
from hooked_moe.paper import open_released, ranked_removals, released_cells
from hooked_moe.paper.cells import released_cells_table
from hooked_moe.paper.comparison import compare, counterpart, read_run
from hooked_moe.paper.published import METRICS, MODELS
from hooked_moe.tables import COMPARISONS, write_checked_json, write_csv_atomic
from tests.support.number_text import number_reader, token_ids, write_corpus

LENGTHS = (40, 90, 61, 75, 52, 48)  # tokens of the texts, long enough for every rule: two or three characters a token
Make = Callable[..., HookedMoE]


@pytest.fixture
def model(make_model: Make) -> HookedMoE:
    return number_reader(make_model, n_layers=3, n_ctx=64, model_type="olmoe")


@pytest.fixture
def corpus() -> Corpus:
    """Two documents of three paragraphs, and one too short to be read."""
    texts = [" ".join(map(str, token_ids(length, n))) for n, length in enumerate(LENGTHS)]
    documents = ["\n\n".join(texts[:3]), "\n \n".join([*texts[3:], "too short"])]
    return Corpus("numbers", [Document(f"d{n}", "a", "", text) for n, text in enumerate(documents)], "0" * 64)


def test_a_comparison_is_the_loss_change_of_two_full_forwards(model, corpus, tmp_path):
    with open_released(model, corpus, results=tmp_path, progress=False) as run:
        table, control = run.audit(5), run.control(5)
    assert table.schema.equals(COMPARISONS)
    assert table.num_rows == len(METRICS) * 3 * 5
    texts = [token_ids(length, n)[:64] for n, length in enumerate(LENGTHS)]
    for row in [*table.to_pylist()[::7], *control.to_pylist()[::3]]:
        tokens = torch.tensor([texts[row["text"]]])
        clean = model(tokens, return_type="loss", loss_per_token=True)[0, row["position"]].item()
        assert row["baseline_loss"] == pytest.approx(clean, abs=1e-5)
        for side in ("high", "low"):
            mask = ExpertMask.ablate([(row["layer"], None, None, row[f"{side}_expert"])])
            without = model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)[0, row["position"]].item()
            assert row[f"{side}_delta"] == pytest.approx(without - clean, abs=1e-5)


def test_the_control_ranks_by_the_tokens_own_weight_and_the_audit_by_the_released_metrics(model, corpus, tmp_path):
    with open_released(model, corpus, results=tmp_path, progress=False) as run:
        table, control, experts = run.audit(4), run.control(4), run.experts().to_pandas()
    texts = [token_ids(length, n)[:64] for n, length in enumerate(LENGTHS)]
    for row in control.to_pylist():
        _, cache = model.run_with_cache(torch.tensor([texts[row["text"]]]))
        active = cache["expert_indices", row["layer"]][0, row["position"]].tolist()
        assert (row["high_expert"], row["low_expert"]) == (active[0], active[-1])
        assert row["high_score"] == pytest.approx(cache["expert_weights", row["layer"]][0, row["position"], 0].item(), abs=1e-6)
    for row in table.to_pylist():
        _, cache = model.run_with_cache(torch.tensor([texts[row["text"]]]))
        active = cache["expert_indices", row["layer"]][0, row["position"]].tolist()
        scores = experts[experts["layer"] == row["layer"]].set_index("expert")[row["ranking"]][active]
        assert row["high_score"] == scores.max()
        assert row["low_score"] == scores.min()


def test_progressive_removal_takes_the_heaviest_experts_from_the_whole_text(model, corpus, tmp_path):
    with open_released(model, corpus, [2], results=tmp_path, progress=False) as run:
        table = run.progressive(4)
    k = model.cfg.experts_per_token
    assert table.num_rows == 4 * (k - 1)
    long = [token_ids(length, n)[:64] for n, length in enumerate(LENGTHS) if len(" ".join(map(str, token_ids(length, n)))) > 100]
    for row in table.to_pylist():
        assert row["position"] >= 31
        tokens = torch.tensor([long[row["text"]]])
        _, cache = model.run_with_cache(tokens)
        heaviest = cache["expert_indices", 2][0, row["position"], : row["removed"]].tolist()
        mask = ExpertMask.ablate([(2, None, None, expert) for expert in heaviest])
        without = model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)[0, row["position"]].item()
        assert row["baseline_loss"] + row["delta_loss"] == pytest.approx(without, abs=1e-5)


def test_texts_side_by_side_share_no_hooks(model, corpus, tmp_path, monkeypatch):
    # Hooks belong to the model, and the model to all texts: what one text's hook keeps, another's could overwrite.
    with open_released(model, corpus, [2], results=tmp_path, progress=False) as run:
        monkeypatch.setattr(HookPoint, "add_hook", lambda *inputs, **options: pytest.fail("a hook was attached"))
        run.progressive(4)


def test_a_run_that_was_killed_resumes_with_the_texts_that_it_lacks_to_the_same_bytes(model, corpus, tmp_path, monkeypatch):
    with open_released(model, corpus, results=tmp_path / "whole", progress=False) as run:
        run.audit(6)
        whole = (run.directory / "audit-6.parquet").read_bytes()

    measured: list[int] = []
    real = ranked_removals.sequence_removals

    def dying(*arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*arguments)

    monkeypatch.setattr(ranked_removals, "sequence_removals", dying)
    with open_released(model, corpus, results=tmp_path / "cut", progress=False) as run, pytest.raises(KeyboardInterrupt):
        run.audit(6)
    monkeypatch.setattr(ranked_removals, "sequence_removals", lambda *arguments: measured.append(2) or real(*arguments))
    with open_released(model, corpus, results=tmp_path / "cut", progress=False) as run:
        run.audit(6)
        assert measured.count(2) == len(LENGTHS) - 3
        assert (run.directory / "audit-6.parquet").read_bytes() == whole
        assert not list((run.directory / "shards").rglob("*.parquet"))
        run.audit(6)  # from its file
        assert measured.count(2) == len(LENGTHS) - 3


def test_what_cannot_be_run_as_released_is_refused(model, corpus, make_model, tmp_path):
    with pytest.raises(ValueError, match="no released protocol for 'mixtral'"):
        open_released(number_reader(make_model, model_type="mixtral"), corpus, results=tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        open_released(make_model(), corpus, results=tmp_path)
    with pytest.raises(ValueError, match=r"layers \[7\] have no experts"):
        open_released(model, corpus, [7], results=tmp_path)
    short = Corpus("short", [Document("d", "a", "", "1 2 3")], "0" * 64)
    with (
        open_released(model, short, results=tmp_path, progress=False) as run,
        pytest.raises(ValueError, match="no paragraph of more than 50"),
    ):
        run.audit(5)
    with (
        open_released(number_reader(make_model, model_type="deepseek_v2"), corpus, results=tmp_path, progress=False) as run,
        pytest.raises(ValueError, match="progressive ablation is OLMoE's"),
    ):
        run.progressive(5)
    with (
        open_released(model, corpus, results=tmp_path, name="one", progress=False),
        pytest.raises(BlockingIOError, match="written by another process"),
    ):
        open_released(model, corpus, results=tmp_path, name="one")
    with pytest.raises(ValueError, match="begun with another protocol"):
        open_released(model, corpus, [1], results=tmp_path, name="one")


# --- cells --------------------------------------------------------------------------------------------------------------


def comparisons(ranking: str, layer: int, high: np.ndarray, low: np.ndarray) -> pa.Table:
    n = len(high)
    score = np.random.default_rng(layer).random((2, n)) + np.array([[1], [0]])
    columns = dict.fromkeys(("text", "position", "high_expert", "low_expert", "baseline_loss"), np.zeros(n))
    columns |= {"layer": np.full(n, layer), "ranking": [ranking] * n, "high_delta": high, "low_delta": low}
    return pa.table(columns | {"high_score": score[0], "low_score": score[1]}).select(COMPARISONS.names).cast(COMPARISONS)


def test_cells_are_decided_by_the_t_test_alone_and_by_both_tests():
    random = np.random.default_rng(3)
    low = random.normal(size=60)
    outlier = low + np.where(np.arange(60) < 8, 3.0, -0.002)  # pulls the mean; most differences point the other way
    clear, none = low + random.normal(0.5, 0.1, 60), low + random.normal(0, 1, 60)
    table = pa.concat_tables(
        [comparisons("activation_norm", 0, outlier, low), comparisons("activation_norm", 1, clear, low)]
        + [comparisons("routing_weight", layer, none, low) for layer in (0, 1)]
    )
    first, second, control, _ = cells = released_cells(table, ddof=0)
    assert (first.t_test_alone, first.agreement) == ("significant", "tests_disagree")
    assert (second.t_test_alone, second.agreement) == ("significant", "positive")
    assert (control.t_test_alone, control.agreement) == ("not significant", "not_detected")
    assert [cell.n_tests for cell in cells] == [2, 2, 2, 2]
    assert first.d == pytest.approx(stat.cohens_dz(outlier, low, ddof=0).d)
    assert (first.ddof, control.ddof) == (0, 1)
    assert np.isnan(first.rho)
    scores = np.random.default_rng(0).random((2, 60)) + np.array([[1], [0]])
    assert control.rho == pytest.approx(scipy.stats.spearmanr(scores[0] / scores[1], none - low).statistic, abs=1e-6)
    assert released_cells_table(cells).column_names[:3] == ["ranking", "layer", "n"]


def test_a_cell_without_variance_says_so():
    same = np.zeros(10)
    (cell,) = released_cells(comparisons("utilization_rate", 0, same, same), ddof=0)
    assert "without variance" in cell.note
    assert np.isnan(cell.d)


# --- beside the published tables -----------------------------------------------------------------------------------------


def test_layers_stand_beside_their_own_in_the_published_model_and_beside_the_nearest_depth_elsewhere():
    olmoe = MODELS[0]
    assert counterpart(7, olmoe, [0, 7], 16) == 7
    assert counterpart(4, olmoe, [0, 7], 16) is None  # not measured: never another layer of the same model
    assert [counterpart(layer, olmoe, [0, 1, 2, 3, 4, 5], 6) for layer in olmoe.layers] == [0, 1, 2, 4, 5]
    assert counterpart(7, olmoe, [], 6) is None


def finished(directory: Path, protocol: str, n_layers: int = 16) -> Path:
    directory.mkdir(parents=True)
    manifest = {"model": {"config": {"model_type": "olmoe", "n_layers": n_layers}}, "protocol": {"name": protocol}}
    write_checked_json(manifest, directory / "manifest.json")
    return directory


def test_a_released_run_with_the_printed_numbers_differs_by_nothing(tmp_path):
    """The released comparisons, written as a run of ours, against Table 1; and what was not run is not a number."""
    from hooked_moe.paper.published import released_comparisons

    theirs = released_comparisons()
    names = {"ranking": "metric", "high_score": "high_metric", "low_score": "low_metric"}
    ours = {name: theirs[names.get(name, name)] for name in COMPARISONS.names if name != "baseline_loss"}
    table = pa.table({**ours, "baseline_loss": np.zeros(len(theirs))}).select(COMPARISONS.names).cast(COMPARISONS)
    directory = finished(tmp_path / "run", "as_released")
    write_csv_atomic(released_cells_table(released_cells(table, ddof=0)), directory / "cells.csv")
    compared = compare(read_run(directory))
    first = [one for one in compared if one.published.table == "Table 1"]
    assert len(first) == 40
    assert max(abs(one.difference) for one in first) < 0.0005 + 1e-9
    assert {one.published.table for one in compared if not np.isnan(one.ours)} == {"Table 1"}
    assert {one.published.table for one in compared} == {"Table 1", "Table 4", "Table 8", "Table 9", "Figure 2"}


def test_comparing_writes_a_row_for_every_published_number_and_says_what_was_not_run(tmp_path, capsys):
    directory = finished(tmp_path / "tiny-olmoe" / "one", "as_released", n_layers=6)
    rows = [{"layer": 5, "order": "descending", "removed": 7, "mean": 0.4, "median": 0.1, "p95": 2.0}]
    write_csv_atomic(pa.Table.from_pylist(rows), directory / "progressive.csv")
    assert compare_published.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "layers are matched by relative depth" in out
    assert "Table 1: not measured; hooked-moe audit" in out
    table = pyarrow.csv.read_csv(directory / "published.csv").to_pandas()
    last = table[(table["table"] == "Table 9") & (table["published_layer"] == 15) & (table["statistic"] == "p95")]
    assert last["ours"].item() == 2.0
    assert last["difference"].item() == pytest.approx(2.0 - 2.633)
    assert compare_published.main(["--results", str(tmp_path), "--brief"]) == 0
    assert compare_published.main(["--results", str(tmp_path / "empty")]) == 1
    assert "run `hooked-moe audit` first" in capsys.readouterr().err
    assert compare_published.main([str(tmp_path)]) == 1
    assert "not the directory of a run" in capsys.readouterr().err


# --- scripts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("script", [audit, routing_weight_control, progressive, redistribution])
def test_every_script_runs_as_released_in_one_directory(script, results, capsys):
    sampled = [] if script is redistribution else ["--positions", "6"]
    arguments = ["--model", "tiny-olmoe", "--documents", "1", "--layers", "1", "--protocol", "as_released"]
    assert script.main([*arguments, *sampled, "--results", str(results)]) == 0
    assert "as released: layers 1; weights in float32" in capsys.readouterr().out
    assert len(list((results / "tiny-olmoe").iterdir())) == 1


def test_options_that_the_released_protocol_fixes_are_refused_by_name(capsys):
    assert audit.main(["--protocol", "as_released", "--removal", "reroute", "--scope", "both"]) == 1
    assert "--removal, --scope: --protocol as_released fixes that" in capsys.readouterr().err
    assert audit.main(["--protocol", "as_released", "--ray", "auto"]) == 1
    assert "--ray: --protocol as_released fixes that" in capsys.readouterr().err
    assert redistribution.main(["--protocol", "as_released", "--positions", "5"]) == 1
    assert "--positions '5': the released pairing is of all rows; leave it out" in capsys.readouterr().err
    assert released_positions("all") == 200
    with pytest.raises(ValueError, match="give a number from 3"):
        released_positions("2")


@pytest.mark.parametrize("script", [audit, routing_weight_control, progressive, redistribution, compare_published])
def test_help_shows_examples(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert f"hooked-moe {script.__name__.rpartition('.')[2]}" in capsys.readouterr().out


def test_the_defined_scripts_share_one_measurement(make_model, tmp_path, monkeypatch):
    def page(run: Path, **_: bool) -> Path:  # figures take seconds, and are tested elsewhere
        (run / "report.html").write_text("")
        return run / "report.html"

    monkeypatch.setattr(measured_run, "write_report", page)
    number_reader(make_model, n_layers=2, n_ctx=16).save_pretrained(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.jsonl", (40, 31))
    common = ["--model", str(tmp_path / "model"), "--corpus", str(corpus), "--results", str(tmp_path / "results")]
    assert progressive.main([*common, "--positions", "5"]) == 0
    assert routing_weight_control.main(common) == 0
    assert redistribution.main(common) == 0
    (directory,) = (tmp_path / "results" / "model").iterdir()
    measured = (directory / "effects.parquet").stat().st_mtime_ns
    assert audit.main(common) == 0
    assert (directory / "effects.parquet").stat().st_mtime_ns == measured
    written = {path.name for path in directory.iterdir()}
    assert {"control.csv", "progressive.csv", "redistribution.csv", "cells.csv", "report.html"} <= written

    rows = pyarrow.csv.read_csv(directory / "control.csv").to_pylist()
    (cell,) = [row for row in rows if (row["ranking"], row["population"], row["layer"]) == ("routing_weight", "all", 1)]
    effects = pq.read_table(directory / "effects.parquet").to_pandas()
    layer = effects[(effects["layer"] == 1) & effects["delta_loss"].notna()]
    first, last = (layer[layer["slot"] == slot] for slot in (0, layer["slot"].max()))
    ratio = first["routing_weight"].to_numpy() / last["routing_weight"].to_numpy()
    contrast = first["delta_loss"].to_numpy() - last["delta_loss"].to_numpy()
    assert len(ratio) == 40 + 31 - 2
    assert cell["rho_weight_ratio"] == pytest.approx(scipy.stats.spearmanr(ratio, contrast).statistic, abs=1e-6)
