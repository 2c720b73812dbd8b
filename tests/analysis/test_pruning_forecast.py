"""Forecasts of pruning against sums over rows; choices keep enough experts, learn from one half, and say what limits them."""

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run, choose_experts, predict_pruning
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from tests.support.synthetic_effects import synthetic_effects, synthetic_run
from tests.support.whole_tables import read_effects

N_EXPERTS = 16
EFFECTS = synthetic_effects(n_documents=12)
COLUMNS = ("expert", "delta_loss", "kl")


def sums_of(effects: pa.Table) -> pa.Table:
    grid = read_effects(effects, COLUMNS).measured()
    sums = ExpertEffectSums(grid.layers, N_EXPERTS)
    sums.update(grid)
    return sums.table()


SUMS = sums_of(EFFECTS)


@pytest.mark.parametrize("effect", ["kl", "delta_loss"])
@pytest.mark.parametrize("half", [None, "even", "odd"])
def test_the_forecast_is_the_sum_of_single_removals_per_token(effect, half):
    experts = {0: [3, 7, 15], 2: [1]}  # 15 is never active
    frame = EFFECTS.to_pandas().dropna(subset=["delta_loss"])
    if half is not None:
        frame = frame[frame["document"] % 2 == (half == "odd")]
    n_positions = len(frame[["document", "position"]].drop_duplicates())
    removed = frame[[expert in experts.get(layer, ()) for layer, expert in zip(frame["layer"], frame["expert"], strict=True)]]
    forecast = predict_pruning(SUMS, experts, effect, half=half)
    assert forecast.rise == pytest.approx(removed[effect].astype(float).sum() / n_positions, rel=1e-6)
    assert forecast.low < forecast.rise < forecast.high
    assert (forecast.factor, forecast.share, forecast.n_documents) == (1.0, 3 / 16, 12 if half is None else 6)
    assert forecast.note.startswith("no pruning.csv")


def test_a_measured_factor_is_applied_and_large_shares_are_marked(tmp_path):
    run = synthetic_run(tmp_path / "run", n_documents=12, n_tokens=20)
    analyse_run(run, n_experts=N_EXPERTS)
    plain = predict_pruning(run, {0: [1, 2]})
    rows = {
        "kind": ["criterion", "criterion", "random", "random", "table", "oracle", "criterion"],
        "per": ["layer"] * 6 + ["model"],
        "share": [0.125, 0.125, 0.125, 0.25, 0.25, 0.125, 0.125],
        "rise": [1.0, 1.2, 9.0, 1.5, 7.0, 8.0, 6.0],  # the last three count for nothing
        "predicted_kl": [1.0] * 7,
    }
    tables.write_derived(run, "pruning", {"pruning.csv": pa.table(rows)}, ["effects.parquet"], "hooked-moe prune")
    forecast = predict_pruning(run, {0: [1, 2]})
    assert (forecast.factor, forecast.note) == (1.2, "")
    assert forecast.rise == pytest.approx(1.2 * plain.rise)
    assert forecast.high == pytest.approx(1.2 * plain.high)
    between = predict_pruning(run, {0: [1, 2, 3]})
    assert between.factor == pytest.approx(1.35)
    beyond = predict_pruning(run, {0: range(6)})
    assert "removals interact" in beyond.note
    assert "measured 12.5% to 25.0%" in beyond.note


def test_stale_and_damaged_tables_are_not_forecast_from(tmp_path):
    run = synthetic_run(tmp_path / "run", n_documents=12, n_tokens=20)
    analyse_run(run, n_experts=N_EXPERTS)
    rows = {"kind": ["criterion"], "per": ["layer"], "share": [0.125], "rise": [1.2], "predicted_kl": [1.0]}
    tables.write_derived(run, "pruning", {"pruning.csv": pa.table(rows)}, [], "hooked-moe prune")
    plain = predict_pruning(run, {0: [1, 2]})
    pruning = (run / "pruning.csv").read_bytes()
    (run / "pruning.csv").write_bytes(pruning.replace(b"1.2", b"2.1"))
    changed = predict_pruning(run, {0: [1, 2]})
    assert (plain.factor, changed.factor) == (1.2, 1.0)
    assert "pruning.csv is not used (pruning.csv does not have the checksum" in changed.note
    assert "`hooked-moe prune` makes it again" in changed.note
    tables.write_parquet_atomic(synthetic_effects(n_documents=12, n_tokens=21), run / "effects.parquet")
    for ask in (lambda: predict_pruning(run, {0: [1, 2]}), lambda: choose_experts(run, 0.25)):
        with pytest.raises(ValueError, match=r"expert_effect_sums\.parquet .*made of another effects\.parquet"):
            ask()
    table = tables.read_parquet(run / "expert_effect_sums.parquet")
    assert predict_pruning(table, {0: [1, 2]}).rise == pytest.approx(changed.rise)


def test_the_cheapest_of_every_layer_are_chosen_and_enough_remain():
    effects = EFFECTS
    cost = np.where(EFFECTS["expert"].to_numpy() < 4, 0.0, 1.0).astype(np.float32)
    for name in ("kl", "delta_loss"):
        effects = effects.set_column(effects.schema.get_field_index(name), name, pa.array(cost))
    table = sums_of(effects)
    quarter = choose_experts(table, 5 / 16)
    assert quarter == {layer: [0, 1, 2, 3, 15] for layer in (0, 1, 2)}  # 15 is never active: it costs nothing
    assert predict_pruning(table, quarter, half="odd").rise == pytest.approx(0, abs=1e-6)
    assert choose_experts(table, 5 / 16, layers=[1]) == {1: [0, 1, 2, 3, 15]}
    most = choose_experts(table, 0.99)
    assert {len(experts) for experts in most.values()} == {N_EXPERTS - 4}  # a token goes to four
    everywhere = choose_experts(table, 15 / 48, per="model", effect="delta_loss")
    assert sum(map(len, everywhere.values())) == 15
    assert all({0, 1, 2, 3} >= set(experts) - {15} for experts in everywhere.values())
    assert max(map(len, choose_experts(table, 0.9, per="model", keep=6).values())) == N_EXPERTS - 6


def test_a_choice_learns_from_its_half_alone():
    table = SUMS.to_pandas()
    table.loc[table["document"] % 2 == 1, "sum_kl"] *= -7
    shaken = pa.Table.from_pandas(table, schema=SUMS.schema, preserve_index=False)
    assert choose_experts(shaken, 0.25, half="even") == choose_experts(SUMS, 0.25, half="even")
    assert choose_experts(shaken, 0.25, half="odd") != choose_experts(SUMS, 0.25, half="odd")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict_pruning(SUMS, {7: [0]}), r"layer 7 was not measured; the run has \[0, 1, 2\]"),
        (lambda: predict_pruning(SUMS, {0: [16]}), r"layer 0 names expert 16 outside 0\.\.15"),
        (lambda: predict_pruning(SUMS, {0: [1, 1]}), "layer 0 names an expert twice"),
        (lambda: predict_pruning(SUMS, {}), "no expert is named"),
        (lambda: predict_pruning(SUMS, {0: [1]}, half="third"), "half must be 'even', 'odd' or None"),
        (lambda: predict_pruning(SUMS.drop_columns(["sum_kl"]), {0: [1]}), "has not measured 'kl'; it has delta_loss"),
        (lambda: choose_experts(SUMS, 1.5), "between 0 and 1, got 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_forecast_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_that_was_not_analysed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expert_effect_sums.parquet does not exist; analysing the run writes it"):
        predict_pruning(tmp_path, {0: [1]})
