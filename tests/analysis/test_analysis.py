"""A run's analysis whole: ceilings, choice models, redistribution and progressive removals against their definitions; what is
absent is said; the size of the chunks changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from benchmarks import analysis_scale
from hooked_moe import analysis, tables
from hooked_moe.analysis import analyse_run, bayes, redistribution
from hooked_moe.analysis.cells import Cell
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.tables.effect_grid import effect_chunks
from tests.support.synthetic_effects import PARTS, PLANTED_LAYER, synthetic_effects, synthetic_run

N_EXPERTS = 16


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    directory = synthetic_run(tmp_path_factory.mktemp("runs") / "made-up", parts=PARTS)
    return directory, analyse_run(directory, n_experts=N_EXPERTS)


@pytest.fixture(scope="module")
def run(analysed) -> Path:
    return analysed[0]


def derived(run: Path) -> list[str]:
    return json.loads((run / "analysis.json").read_text())["derivations"]["analysis"]["outputs"]


def test_every_table_is_written_and_nothing_is_missing(run):
    said = json.loads((run / "analysis.json").read_text())
    assert said["not_measured"] == {}
    assert all((run / name).is_file() for name in derived(run))
    assert len(derived(run)) == 18


def test_what_a_run_has_not_measured_is_said(tmp_path):
    run = synthetic_run(tmp_path / "bare", n_documents=12, n_tokens=20)
    effects = pq.read_table(run / "effects.parquet").drop_columns(["rest_norm"])
    tables.write_parquet_atomic(effects, run / "effects.parquet")
    for name in ("routing.parquet", "documents.parquet", "manifest.json"):
        (run / name).unlink()
    cells = analyse_run(run, n_experts=N_EXPERTS)
    assert json.loads((run / "analysis.json").read_text())["not_measured"] == {
        "routing.parquet": "this run has not measured it",
        "domains.csv": "this run has no documents.parquet",
        "scopes.csv": "this run has no effects_sequence.parquet",
        "progressive.csv": "this run has no progressive.parquet",
        "redistribution.csv": "not measured: the effect table lacks rest_norm or another of the columns that this takes",
    }
    assert not (run / "redistribution.csv").exists()
    assert {cell.note for cell in cells if cell.ranking == "routing_entropy"} == {"not measured: this run has no routing.parquet"}
    for name in ("ceiling.csv", "bayes.csv"):
        notes = pd.read_csv(run / name).set_index("criterion")["note"]
        assert set(np.atleast_1d(notes["routing_entropy"])) == {"not measured: this run has no routing.parquet"}
    assert pd.read_csv(run / "layers.csv")["share_above_floor"].isna().all()


def test_the_size_of_the_chunks_changes_nothing(run, tmp_path, monkeypatch):
    again = shutil.copytree(run, tmp_path / "again")
    monkeypatch.setattr(analysis.run_chunks, "effect_chunks", lambda *arguments: effect_chunks(*arguments, rows=1000))
    analyse_run(again, n_experts=N_EXPERTS)
    for name in derived(run):
        read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
        # max-T and stacking weights hang on comparisons that the last digits may decide
        pd.testing.assert_frame_equal(read(run / name), read(again / name), rtol=1e-6, atol=1e-9, obj=name)


def test_both_scopes_are_audited(analysed):
    _, cells = analysed
    assert [cell.scope for cell in cells] == ["position"] * 126 + ["sequence"] * 126
    last = [cell for cell in cells if cell.layer == PLANTED_LAYER]  # where both removals are the same
    for one, other in zip(last[: len(last) // 2], last[len(last) // 2 :], strict=True):
        assert (one.ranking, one.population) == (other.ranking, other.population)
        assert other.t == pytest.approx(one.t, rel=1e-5, nan_ok=True)


def test_parts_of_other_measurements_are_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    sequence = pq.read_table(run / "effects_sequence.parquet")
    tables.write_parquet_atomic(sequence.slice(0, 480), other / "effects_sequence.parquet")
    with pytest.raises(ValueError, match=r"two effect tables differ in document|differ in length"):
        analyse_run(other, n_experts=N_EXPERTS)
    with pytest.raises(ValueError, match=r"expert 14 outside 0\.\.7"):
        analyse_run(run, n_experts=8)


@pytest.mark.parametrize(
    "options", [{"n_documents": 1, "n_tokens": 9}, {"n_documents": 3, "n_tokens": 4, "k": 1, "layers": (2,)}]
)
def test_what_is_too_small_for_any_statistic_is_analysed_and_says_so(options, tmp_path):
    run = synthetic_run(tmp_path / "tiny", parts=PARTS, **options)
    cells = analyse_run(run, n_experts=N_EXPERTS, n_positions=8)
    assert {cell.outcome for cell in cells if cell.population == "all"} == {"refused"}
    assert all(cell.note for cell in cells if cell.outcome == "refused")
    for name in ("ceiling.csv", "bayes.csv"):
        table = pd.read_csv(run / name).set_index("criterion").drop("chance", errors="ignore")
        assert table["note"].notna().all()
    progressive = pd.read_csv(run / "progressive.csv")
    assert progressive["mean"].notna().all()


# --- ceilings --------------------------------------------------------------------------------------------------------


def test_a_criterion_that_explains_the_loss_changes_reaches_the_ceiling(tmp_path):
    """Planted: the loss change of an expert is its activation norm, and noise."""
    effects = synthetic_effects(n_documents=40, n_tokens=60)
    loudness = effects.to_pandas().groupby(["layer", "expert"])["output_norm"].mean()
    keys = zip(effects["layer"].to_pylist(), effects["expert"].to_pylist(), strict=True)
    planted = effects["delta_loss"].to_numpy() + 0.05 * loudness.loc[list(keys)].to_numpy().astype(np.float32)
    effects = effects.set_column(effects.schema.get_field_index("delta_loss"), "delta_loss", pa.array(planted))
    run = synthetic_run(tmp_path / "planted", n_documents=40, n_tokens=60)
    tables.write_parquet_atomic(effects, run / "effects.parquet")
    analyse_run(run, n_experts=N_EXPERTS, layers=[0, 1])
    ceiling = pd.read_csv(run / "ceiling.csv")
    assert set(ceiling["layer"]) == {0, 1}
    for layer, rows in ceiling.groupby("layer"):
        by_criterion = rows.set_index("criterion")
        assert by_criterion["ceiling"].nunique() == 1
        assert by_criterion.loc["activation_norm", "share_of_ceiling"] == pytest.approx(1, abs=0.15), layer
        assert by_criterion.loc["oracle", "share_of_ceiling"] > 0.9
        assert by_criterion.loc["aimer", "share_of_ceiling"] < 0.5
        assert by_criterion.loc["activation_norm", "slope"] == pytest.approx(0.05, rel=0.2)
        frame = effects.to_pandas().query("layer == @layer").dropna(subset=["delta_loss"])
        centred = frame["delta_loss"] - frame.groupby(["document", "position"])["delta_loss"].transform("mean")
        in_sample = (frame.assign(c=centred).groupby("expert")["c"].transform("mean") ** 2).sum() / (centred**2).sum()
        assert by_criterion["ceiling"].iloc[0] == pytest.approx(in_sample, rel=0.35)  # company and folds not allowed for


# --- choice models ---------------------------------------------------------------------------------------------------


def test_the_token_scores_are_recognised_and_the_criteria_are_not(run):
    table = pd.read_csv(run / "bayes.csv").set_index("criterion")
    assert list(table.index) == [*CRITERIA, "routing_weight", "gap_norm", "first_order", "first_order_curved", "oracle", "chance"]
    assert (table.loc[list(CRITERIA), "pl_bf10"] < 3).all()
    assert (table.loc[["routing_weight", "gap_norm", "first_order", "first_order_curved"], "pl_bf10"] > 1000).all()
    lodo = table["lodo_score"]
    assert lodo["first_order"] > lodo["routing_weight"] > 0.01 > lodo[list(CRITERIA)].max()
    assert table["stacking_weight"].sum() == pytest.approx(1)
    assert table.loc[["first_order", "first_order_curved", "oracle"], "stacking_weight"].isna().all()
    assert (table["n_positions_available"] == 24 * 39).all()


def test_a_long_corpus_is_thinned_evenly_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bayes, "MAXIMUM_ORDERS", 1000)
    again = shutil.copytree(run, tmp_path / "again")
    analyse_run(again, n_experts=N_EXPERTS)
    table = pd.read_csv(again / "bayes.csv").set_index("criterion")
    assert set(table["n_positions_used"].drop("chance")) == {312}  # every third of 936: 936 orders
    whole = pd.read_csv(run / "bayes.csv").set_index("criterion")
    score = "routing_weight"
    assert abs(table.loc[score, "pl_beta"] - whole.loc[score, "pl_beta"]) < 4 * table.loc[score, "pl_sd"]


# --- redistribution --------------------------------------------------------------------------------------------------


def test_redistribution_correlates_over_the_tokens_of_each_expert(run):
    frame = pq.read_table(run / "effects.parquet").to_pandas()
    frame["compensation"] = frame["rest_norm"] * frame["rest_cosine"].clip(lower=0) / frame["gap_norm"]
    experts = pd.read_csv(run / "redistribution_experts.csv").set_index(["layer", "expert"])
    pairs = {
        "rho_weight_gap": ("routing_weight", "gap_norm"),
        "rho_weight_norm": ("routing_weight", "output_norm"),
        "rho_gap_compensation": ("gap_norm", "compensation"),
        "rho_gap_alignment": ("gap_norm", "rest_cosine"),
    }
    for at, rows in frame.groupby(["layer", "expert"]):
        assert experts.loc[at, "n_used"] == experts.loc[at, "n_tokens"] == len(rows)
        assert experts.loc[at, "median_compensation"] == pytest.approx(rows["compensation"].median(), rel=1e-5)
        for name, (one, two) in pairs.items():
            expected = scipy.stats.spearmanr(rows[one], rows[two]).statistic
            assert experts.loc[at, name] == pytest.approx(expected, abs=1e-6), name
    layers = pd.read_csv(run / "redistribution.csv").set_index("layer")
    assert layers.loc[1, "rho_weight_gap"] == pytest.approx(experts.loc[1, "rho_weight_gap"].mean())
    assert (layers["n_experts"] == 15).all()  # one is never selected
    assert (layers["rho_weight_gap_low"] > 0.5).all()  # the identity
    assert (layers["rho_weight_norm"].abs() < 0.2).all()  # what is none


def test_much_used_experts_are_thinned_evenly(run, tmp_path, monkeypatch):
    monkeypatch.setattr(redistribution, "TOKENS_PER_EXPERT", 100)
    again = shutil.copytree(run, tmp_path / "again")
    analyse_run(again, n_experts=N_EXPERTS)
    experts = pd.read_csv(again / "redistribution_experts.csv")
    stride = np.ceil(experts["n_tokens"] / 100).clip(lower=1)
    assert (experts["n_used"] == np.ceil(experts["n_tokens"] / stride)).all()
    assert experts["n_used"].max() <= 100


# --- progressive removals --------------------------------------------------------------------------------------------


def test_progressive_removals_equal_pandas_with_intervals_that_hold_them(run):
    frame = pq.read_table(run / "progressive.parquet").to_pandas().astype({"delta_loss": float})
    table = pd.read_csv(run / "progressive.csv").set_index(["layer", "order", "removed"])
    groups = frame.groupby(["layer", "order", "removed"])["delta_loss"]
    assert len(table) == len(groups) == 3 * 3 * 4
    for at, values in groups:
        row = table.loc[at]
        assert (row["n_positions"], row["n_documents"]) == (24 * 39, 24)
        assert row["mean"] == pytest.approx(values.mean())
        assert row["median"] == pytest.approx(values.median(), abs=1e-3)
        assert row["p95"] == pytest.approx(values.quantile(0.95), rel=0.02)
        for name in ("mean", "median", "p95"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        below = (values <= values.median()).groupby(frame["document"]).mean()  # documents of one length
        reach = scipy.stats.t.ppf(0.975, 23) * below.std(ddof=1) / np.sqrt(24)
        low, high = values.quantile([0.5 - reach, 0.5 + reach])
        assert (row["median_low"], row["median_high"]) == pytest.approx((low, high), abs=2e-3)


def test_unknown_orders_are_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    table = pq.read_table(run / "progressive.parquet").slice(0, 12)
    table = table.set_column(table.schema.get_field_index("order"), "order", pa.array(["upward"] * 12))
    tables.write_parquet_atomic(table, other / "progressive.parquet")
    with pytest.raises(ValueError, match="has order 'upward'; there are descending, ascending, random"):
        analyse_run(other, n_experts=N_EXPERTS)


# --- scale -----------------------------------------------------------------------------------------------------------


def test_the_benchmark_of_scale_analyses_what_it_makes_up(capsys):
    (table,) = analysis_scale.main(["--small", "--sequence", "--threads", "1"])
    assert str(table) in capsys.readouterr().out
    assert [row[:2] for row in table.rows] == [["2,000", "64,000"], ["4,000", "128,000"]]


def test_an_analysis_beyond_the_memory_it_may_take_is_a_failure(monkeypatch):
    monkeypatch.setattr(analysis_scale, "MEMORY", 1)
    monkeypatch.setattr(analysis_scale, "analysed", lambda *_: {"seconds": 1.0, "before": 1.0, "peak": 2.0})
    with pytest.raises(RuntimeError, match="32,000 rows took"):
        analysis_scale.main(["--small", "--tokens", "2000"])
