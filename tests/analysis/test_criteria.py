"""The criteria against loops over tokens, and their independence of where the table is cut into chunks."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_moe.analysis import criteria
from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.criteria import CRITERIA, EXTENDED_CRITERIA, PAPER_CRITERIA, criteria_table
from hooked_moe.tables import write_parquet_atomic
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks
from tests.support.synthetic_effects import synthetic_effects, synthetic_expert_weights, synthetic_routing
from tests.support.whole_tables import audit_cells, expert_criteria, read_effects

N_EXPERTS = 16
EFFECTS = synthetic_effects(n_documents=6, n_tokens=20)
ROUTING = synthetic_routing(EFFECTS)
WEIGHTS = synthetic_expert_weights()


def all_criteria(effects: pa.Table = EFFECTS) -> pa.Table:
    return expert_criteria(effects, n_experts=N_EXPERTS, routing=ROUTING, expert_weights=WEIGHTS)


def slow_criteria() -> list[dict[str, float]]:
    """Definitions, read aloud: one expert at a time, over the rows that selected it."""
    rows, result = EFFECTS.to_pylist(), []
    weights = {(row["layer"], row["expert"]): row for row in WEIGHTS.to_pylist()}
    for layer, expert in itertools.product((0, 1, 2), range(N_EXPERTS)):
        here = [row for row in rows if row["layer"] == layer]
        tokens = {(row["document"], row["position"]) for row in here}
        active = [row for row in here if row["expert"] == expert]
        n = len(active)
        g, norms = ([row[name] for row in active] for name in ("routing_weight", "output_norm"))
        routing = [row for row in ROUTING.to_pylist() if (row["layer"], row["expert"]) == (layer, expert)]
        selecting = {(row["document"], row["position"]) for row in active}
        company: dict[int, int] = {}
        for row in here:
            if (row["document"], row["position"]) in selecting and row["expert"] != expert:
                company[row["expert"]] = company.get(row["expert"], 0) + 1
        own = weights[layer, expert]
        result.append(
            {
                "layer": layer,
                "expert": expert,
                "n_tokens": n,
                "utilization_rate": n / len(tokens),
                "activation_norm": np.mean(norms) if n else np.nan,
                "mean_routing_weight_when_active": np.mean(g) if n else np.nan,
                "activation_std": np.std(norms, ddof=1) if n > 1 else np.nan,
                "mean_router_probability": sum(row["sum_probability"] for row in routing) / len(tokens),
                "weighted_frequency": sum(g) / len(tokens),
                "ean_sum": sum(norms),
                "mean_squared_norm": np.mean(np.square(norms)) if n else np.nan,
                "weighted_ean": np.dot(g, norms),
                "reap": np.dot(g, norms) / n if n else np.nan,
                "max_activation": np.nanmax([row["max_activation"] for row in routing]) if n else np.nan,
                "routing_entropy": sum(row["sum_entropy"] for row in routing) / n if n else np.nan,
                "router_row_norm": own["router_row_norm"],
                "expert_weight_norm": own["weight_norm"],
                "aimer": own["mean_abs_weight"] / own["rms_weight"],
                "coactivation": max(company.values()) / n if n else np.nan,
            }
        )
    return result


def assert_same(table: pa.Table, expected: pa.Table | list[dict[str, float]], rtol: float = 1e-12) -> None:
    reference = expected if isinstance(expected, pa.Table) else pa.Table.from_pylist(expected)
    assert set(table.column_names) == set(reference.column_names)
    for name in table.column_names:
        np.testing.assert_allclose(table[name].to_numpy(), reference[name].to_numpy(), rtol=rtol, err_msg=name)


def test_every_criterion_equals_its_definition():
    assert_same(all_criteria(), slow_criteria())


def test_every_criterion_has_its_formula_and_source():
    assert PAPER_CRITERIA == ("utilization_rate", "activation_norm", "mean_routing_weight_when_active", "activation_std")
    assert set(PAPER_CRITERIA) | set(EXTENDED_CRITERIA) == set(CRITERIA)
    assert len(CRITERIA) == 16
    for name, criterion in CRITERIA.items():
        assert criterion.name == name == criterion.compute.__name__
        assert ("2606.10703" in criterion.source) == (criterion.family == "paper")
        assert any(source in criterion.compute.__doc__ for source in ("arXiv", "Shannon")), name
        assert criterion.formula
        assert criterion.unit


def test_utilization_sums_to_k_and_an_expert_never_selected_is_zero_there_and_undefined_elsewhere():
    table = all_criteria()
    by_layer = table["utilization_rate"].to_numpy().reshape(3, N_EXPERTS)
    np.testing.assert_allclose(by_layer.sum(axis=1), 4)
    never = table.filter(pa.compute.equal(table["expert"], N_EXPERTS - 1)).to_pydict()
    assert never["n_tokens"] == [0, 0, 0] == never["utilization_rate"]
    for name in ("activation_norm", "activation_std", "reap", "max_activation", "routing_entropy", "coactivation"):
        assert np.isnan(never[name]).all()
    for name in ("ean_sum", "weighted_ean", "weighted_frequency"):
        assert never[name] == [0, 0, 0]


@given(st.lists(st.integers(0, 120), max_size=8))
@settings(max_examples=20, deadline=None)
def test_the_table_may_be_cut_anywhere_between_positions(cuts):
    grid = read_effects(EFFECTS)
    accumulator = ExpertAccumulator((0, 1, 2), N_EXPERTS)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 120]):
        if stop > start:
            accumulator.update(grid.at_positions(np.arange(start, stop)))
    assert_same(criteria_table(accumulator.statistics(ROUTING, WEIGHTS)), all_criteria())


def test_a_parquet_file_gives_what_the_table_gives(tmp_path):
    for name, table in (("effects", EFFECTS), ("routing", ROUTING), ("weights", WEIGHTS)):
        write_parquet_atomic(table, tmp_path / f"{name}.parquet", row_group_size=77)
    effects, routing, weights = (tmp_path / f"{name}.parquet" for name in ("effects", "routing", "weights"))
    from_files = expert_criteria(effects, n_experts=N_EXPERTS, routing=routing, expert_weights=weights)
    assert_same(from_files, all_criteria())


def test_the_last_token_of_a_document_counts_though_it_has_no_delta():
    without = EFFECTS.filter(pa.compute.invert(pa.compute.is_nan(EFFECTS["delta_loss"])))
    full, cut = (expert_criteria(table, n_experts=N_EXPERTS)["n_tokens"].to_numpy() for table in (EFFECTS, without))
    assert full.sum() - cut.sum() == 6 * 3 * 4  # documents, layers, slots


def test_a_tiny_spread_on_a_large_norm_survives():
    """Sum-of-squares formulas lose everything here; the merge must not."""
    norm = 1e6 + np.random.default_rng(0).normal(0, 1e-3, 10_000)
    accumulator = ExpertAccumulator([5], 1)
    for chunk in np.split(norm, 100):
        rows = np.zeros((len(chunk), 1, 1))
        valid = np.ones(len(chunk), bool)
        order = np.arange(len(chunk))
        accumulator.update(
            EffectGrid(
                order, order, (5,), rows.astype(int), rows, valid, routing_weight=rows + 1, output_norm=chunk[:, None, None]
            )
        )
    table = criteria_table(accumulator.statistics())
    assert table["activation_std"][0].as_py() == pytest.approx(norm.std(ddof=1), rel=1e-6)
    assert np.isnan(table["coactivation"][0].as_py())  # alone at every token


def test_layers_not_asked_for_are_passed_over():
    whole = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    some = expert_criteria(EFFECTS, n_experts=N_EXPERTS, layers=[2])
    assert_same(some, whole.filter(pa.compute.equal(whole["layer"], 2)))


def test_what_a_run_has_not_measured_is_undefined_throughout():
    table = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    for name, criterion in CRITERIA.items():
        assert np.isnan(table[name].to_numpy()).all() == (criterion.measured_in != "effects.parquet"), name


def test_tables_of_another_measurement_are_refused():
    with pytest.raises(ValueError, match=r"not the same of each expert: they are not of one measurement"):
        expert_criteria(EFFECTS, n_experts=N_EXPERTS, routing=ROUTING.slice(1))
    with pytest.raises(ValueError, match=r"once; 1 are missing or repeated"):
        expert_criteria(EFFECTS, n_experts=N_EXPERTS, expert_weights=WEIGHTS.slice(1))
    with pytest.raises(ValueError, match="has expert 31, but the model has 16 experts"):
        expert_criteria(EFFECTS, n_experts=N_EXPERTS, expert_weights=synthetic_expert_weights(n_experts=32))
    with pytest.raises(ValueError, match="has no column sum_entropy"):
        expert_criteria(EFFECTS, n_experts=N_EXPERTS, routing=ROUTING.drop_columns(["sum_entropy"]))


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_counted_is_refused_by_name():
    (chunk,) = effect_chunks(EFFECTS)
    with pytest.raises(ValueError, match=r"expert 14 outside 0\.\.3"):
        ExpertAccumulator([0], 4).update(chunk)
    with pytest.raises(ValueError, match="lacks routing_weight or output_norm"):
        ExpertAccumulator([0], 16).update(read_effects(EFFECTS, columns=("expert",)))
    chunk.output_norm[3, 0, 2] = np.nan
    with pytest.raises(ValueError, match="output_norm has 1 values that are NaN or infinite"):
        ExpertAccumulator([0], 16).update(chunk)
    with pytest.raises(ValueError, match=r"no token seen in layers \[0\]"):
        ExpertAccumulator([0], 4).statistics()
    with pytest.raises(ValueError, match="distinct layers"):
        ExpertAccumulator([0, 0], 4)
    with pytest.raises(ValueError, match="no rows"):
        expert_criteria(EFFECTS.slice(0, 0), n_experts=4)


def test_a_criterion_of_ones_own_is_ranked_like_the_others(monkeypatch):
    monkeypatch.setattr("hooked_moe.analysis.criteria.CRITERIA", dict(CRITERIA))
    monkeypatch.setattr("hooked_moe.analysis.rankings.CRITERIA", criteria.CRITERIA)

    @criteria.criterion(label="loudest", formula="mean ||E_e||, squared", unit="1", source="made up")
    def loudness(statistics):
        return statistics.mean_norm**2

    table = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    np.testing.assert_array_equal(table["loudness"].to_numpy(), table["activation_norm"].to_numpy() ** 2)
    cells = audit_cells(EFFECTS, table, layers=[0], n_positions=60)
    assert {cell.family for cell in cells if cell.ranking == "loudness"} == {"extended"}
    with pytest.raises(ValueError, match=r"there is a criterion 'loudness' already \(made up\)"):
        criteria.criterion(label="again", formula="0", unit="1", source="elsewhere")(loudness)
