"""What a run's summaries say, against pandas over all rows at once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_moe.analysis import analyse_run
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.accumulators.histogram import Histogram
from hooked_moe.analysis.summaries import LAYER_COLUMNS, ScopeSummary
from tests.support.synthetic_effects import PARTS, synthetic_effects, synthetic_run
from tests.support.whole_tables import read_effects

N_EXPERTS = 16
EFFECTS = synthetic_effects()
FRAME = EFFECTS.to_pandas()
MEASURED = FRAME.dropna(subset=["delta_loss"]).astype({"delta_loss": float})
FLOOR = 2.1e-6  # of the made-up manifest
BIN = 5e-4  # relative width of a histogram's bins


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = synthetic_run(tmp_path_factory.mktemp("runs") / "made-up", parts=PARTS)
    analyse_run(directory, n_experts=N_EXPERTS)
    return directory


def test_layers_and_slots_equal_pandas(run):
    summary = pd.read_csv(run / "layers.csv")
    assert list(summary.columns) == list(LAYER_COLUMNS)
    assert len(summary) == 3 * 5
    for row in summary.itertuples():
        here, measured = ((x[x["layer"] == row.layer]) for x in (FRAME, MEASURED))
        if row.slot != -1:
            here, measured = ((x[x["slot"] == row.slot]) for x in (here, measured))
        delta = measured["delta_loss"]
        assert (row.n_positions, row.n_removals) == (24 * 40, len(delta))
        expected = (delta.mean(), delta.abs().mean(), (delta > 0).mean(), (delta.abs() > FLOOR).mean())
        assert (row.mean_delta, row.mean_abs_delta, row.share_positive, row.share_above_floor) == pytest.approx(expected)
        assert row.p95_abs_delta == pytest.approx(delta.abs().quantile(0.95), rel=0.02)  # among 936 values
        expected = (here["gap_norm"].mean(), here["output_norm"].mean(), here["routing_weight"].mean())
        assert (row.mean_gap_norm, row.mean_output_norm, row.mean_routing_weight) == pytest.approx(expected, rel=1e-5)


def test_slots_have_means_with_intervals_over_documents(run):
    slots = pd.read_csv(run / "slots.csv")
    assert len(slots) == 4 * 4
    for row in slots.itertuples():
        here = MEASURED[MEASURED["slot"] == row.slot]
        here = here if row.layer == -1 else here[here["layer"] == row.layer]
        assert row.n_removals == len(here)
        assert row.mean_delta == pytest.approx(here["delta_loss"].mean(), rel=1e-6)
        documents = here.groupby("document")["delta_loss"].mean()
        se = documents.std(ddof=1) / np.sqrt(len(documents))
        width = row.mean_delta_high - row.mean_delta_low
        assert 3 * se < width < 6 * se  # t would give 4.1; the bootstrap follows the skew
        assert row.mean_delta_low < row.mean_delta < row.mean_delta_high


def test_the_distribution_by_slot_equals_pandas(run):
    slots = pd.read_csv(run / "slot_distribution.csv")
    for slot, values in MEASURED.groupby("slot")["delta_loss"]:
        one = slots[slots["slot"] == slot]
        tail = one[one["statistic"] == "abs delta exceeded by share"]
        for level, nats in zip(tail["level"], tail["nats"], strict=True):
            assert (values.abs() > nats).mean() == pytest.approx(level, abs=3 / len(values))
        middle = one[one["statistic"] == "quantile of delta"]
        np.testing.assert_allclose(middle["nats"], np.quantile(values, middle["level"]), rtol=2 * BIN, atol=1e-4)


def test_domains_equal_pandas(run):
    domains = pq.read_table(run / "documents.parquet").to_pandas().set_index("document")["domain"]
    frame = MEASURED.assign(domain=MEASURED["document"].map(domains))
    for row in pd.read_csv(run / "domains.csv").itertuples():
        here = frame[frame["domain"] == row.domain]
        assert (row.n_documents, row.n_positions) == (8, 8 * 39)
        tokens = here[(here["layer"] == 0) & (here["slot"] == 0)]
        assert row.baseline_loss == pytest.approx(tokens["baseline_loss"].mean(), rel=1e-6)
        assert row.mean_delta == pytest.approx(here["delta_loss"].mean())
        assert row.mean_abs_delta == pytest.approx(here["delta_loss"].abs().mean())
        wide = here.pivot(index=["document", "position"], columns=["layer", "slot"], values="delta_loss")
        contrast = np.mean([wide[layer][0] - wide[layer][3] for layer in (0, 1, 2)], axis=0)
        assert row.top_minus_bottom == pytest.approx(contrast.mean())
        assert row.d_position == pytest.approx(contrast.mean() / contrast.std(ddof=1))


def test_experts_have_the_mean_loss_change_of_their_removal_and_its_clustered_error(run):
    experts = pq.read_table(run / "experts.parquet").to_pandas().set_index(["layer", "expert"])
    assert experts["n_removals"].sum() == len(MEASURED)
    assert np.isnan(experts.loc[(0, 15), "mean_delta"])
    for at, here in MEASURED.groupby(["layer", "expert"]):
        delta = here["delta_loss"]
        assert experts.loc[at, "n_removals"] == len(delta)
        assert experts.loc[at, "mean_delta"] == pytest.approx(delta.mean(), rel=1e-5)
        residuals = (delta - delta.mean()).groupby(here["document"]).sum()
        se = np.sqrt((residuals**2).sum() * len(residuals) / (len(residuals) - 1)) / len(delta)
        assert experts.loc[at, "mean_delta_se"] == pytest.approx(se, rel=1e-5)


def test_a_document_may_go_on_in_the_next_chunk():
    whole = ExpertEffectSums((0, 1, 2), N_EXPERTS)
    grid = read_effects(EFFECTS, ("expert", "delta_loss", "kl")).measured()
    whole.update(grid)
    pieces = ExpertEffectSums((0, 1, 2), N_EXPERTS)
    for some in np.array_split(np.arange(len(grid.document)), 50):
        pieces.update(grid.at_positions(some))
    for name, values in pieces.mean_delta().items():
        np.testing.assert_allclose(values, whole.mean_delta()[name], rtol=1e-9, err_msg=name)
    for name in ("document", "layer", "expert", "n_positions", "n_removals", "sum_delta_loss", "sum_kl"):
        np.testing.assert_allclose(pieces.table()[name].to_numpy(), whole.table()[name].to_numpy(), rtol=1e-9, err_msg=name)


def test_scopes_are_compared_row_by_row(run):
    sequence = pq.read_table(run / "effects_sequence.parquet").to_pandas()
    both = FRAME.assign(sequence=sequence["delta_loss"]).dropna(subset=["delta_loss"]).astype(float)
    for row in pd.read_csv(run / "scopes.csv").itertuples():
        one, other = (both[both["layer"] == row.layer][name] for name in ("delta_loss", "sequence"))
        assert row.mean_abs_position == pytest.approx(one.abs().mean())
        assert row.mean_abs_sequence == pytest.approx(other.abs().mean())
        assert row.mean_abs_gap == pytest.approx((one - other).abs().mean(), abs=1e-12)
        assert row.correlation == pytest.approx(np.corrcoef(one, other)[0, 1])
        assert row.same_sign == pytest.approx((np.sign(one) == np.sign(other)).mean())


def test_scopes_measured_at_other_positions_are_compared_where_both_were():
    grid = read_effects(EFFECTS).measured()
    summary = ScopeSummary((0, 1, 2))
    summary.update(grid, grid.at_positions(np.arange(0, len(grid.document), 3)))
    table = summary.table().to_pandas()
    assert (table["mean_abs_gap"] == 0).all()
    np.testing.assert_allclose(table["correlation"], 1)


# --- quantiles of a stream -------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 3000), st.floats(-12, 3))
@settings(max_examples=40, deadline=None)
def test_quantiles_of_a_histogram_are_within_its_bins(seed, n, log_scale):
    """Against the order statistics around the level: between two of them, any value is a quantile."""
    values = (np.random.default_rng(seed).standard_t(2, n) * np.exp(log_scale)).astype(np.float32).clip(-1000, 1000)
    histogram = Histogram(2)
    for some in np.array_split(values, 3):
        histogram.add(np.ones(len(some), int), some)
    levels = np.array([0, 0.05, 0.5, 0.95, 1])
    for found, wanted in (
        (histogram.quantiles([0, 1], levels), values),
        (histogram.magnitude_quantiles([1], levels), np.abs(values)),
    ):
        at = levels * (n - 1)
        low, high = (np.sort(wanted).astype(float)[index(at).astype(int)] for index in (np.floor, np.ceil))
        assert (found >= low - BIN * np.abs(low) - 1e-9).all()
        assert (found <= high + BIN * np.abs(high) + 1e-9).all()
    assert np.isnan(histogram.quantiles([0], np.array([0.5]))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1024.0])
def test_values_that_have_no_bin_are_refused(value):
    with pytest.raises(ValueError, match="NaN or outside"):
        Histogram(1).add(np.zeros(2, int), np.array([0.5, value], np.float32))
