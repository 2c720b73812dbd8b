"""The criteria against loops over tokens, and their independence of how rows are cut into batches."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_moe.criteria import CRITERIA, CriteriaAccumulator, expert_criteria
from hooked_moe.tables import write_parquet_atomic
from tests.synthetic_effects import synthetic_effects

N_EXPERTS = 16
EFFECTS = synthetic_effects(n_documents=6, n_tokens=20)
COLUMNS = ("layer", "slot", "expert", "routing_weight", "output_norm")


def slow_criteria(effects: pa.Table, n_experts: int) -> list[dict[str, float]]:
    """Definitions, read aloud: one expert at a time, over the rows that selected it."""
    rows = effects.to_pylist()
    result = []
    for layer in sorted({row["layer"] for row in rows}):
        tokens = {(row["document"], row["position"]) for row in rows if row["layer"] == layer}
        for expert in range(n_experts):
            active = [row for row in rows if row["layer"] == layer and row["expert"] == expert]
            weights, norms = ([row[name] for row in active] for name in ("routing_weight", "output_norm"))
            mean = sum(norms) / len(norms) if norms else np.nan
            spread = sum((x - mean) ** 2 for x in norms)
            result.append(
                {
                    "layer": layer,
                    "expert": expert,
                    "n_tokens": len(active),
                    "utilization_rate": len(active) / len(tokens),
                    "activation_norm": mean,
                    "mean_routing_weight_when_active": sum(weights) / len(weights) if weights else np.nan,
                    "activation_std": np.sqrt(spread / (len(norms) - 1)) if len(norms) > 1 else np.nan,
                }
            )
    return result


def assert_same(table: pa.Table, expected: pa.Table | list[dict[str, float]], rtol: float = 1e-12) -> None:
    reference = expected if isinstance(expected, pa.Table) else pa.Table.from_pylist(expected)
    assert set(table.column_names) == set(reference.column_names)
    for name in table.column_names:
        np.testing.assert_allclose(table[name].to_numpy(), reference[name].to_numpy(), rtol=rtol, err_msg=name)


def test_every_criterion_equals_its_definition():
    assert_same(expert_criteria(EFFECTS, n_experts=N_EXPERTS), slow_criteria(EFFECTS, N_EXPERTS))


def test_the_four_criteria_of_the_paper_are_there_by_name():
    expected = {"utilization_rate", "activation_norm", "mean_routing_weight_when_active", "activation_std"}
    assert set(CRITERIA) == expected
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert "2606.10703" in criterion.source
        assert criterion.compute.__doc__


def test_utilization_sums_to_k_and_an_expert_never_selected_is_zero_there_and_undefined_elsewhere():
    table = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    by_layer = table["utilization_rate"].to_numpy().reshape(3, N_EXPERTS)
    np.testing.assert_allclose(by_layer.sum(axis=1), 4)
    never = table.filter(pa.compute.equal(table["expert"], N_EXPERTS - 1)).to_pydict()
    assert never["n_tokens"] == [0, 0, 0] == never["utilization_rate"]
    for name in ("activation_norm", "mean_routing_weight_when_active", "activation_std"):
        assert np.isnan(never[name]).all()


@given(st.lists(st.integers(0, EFFECTS.num_rows), max_size=12))
@settings(max_examples=30, deadline=None)
def test_batches_may_be_cut_anywhere(cuts):
    whole = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    accumulator = CriteriaAccumulator((0, 1, 2), N_EXPERTS)
    edges = [0, *sorted(cuts), EFFECTS.num_rows]
    for start, stop in itertools.pairwise(edges):
        accumulator.update_table(EFFECTS.slice(start, stop - start))
    assert_same(accumulator.table(), whole)


def test_accumulators_of_two_shards_merge_to_that_of_the_whole():
    parts = []
    for rows in (EFFECTS.slice(0, 500), EFFECTS.slice(500)):
        parts.append(CriteriaAccumulator((0, 1, 2), N_EXPERTS))
        parts[-1].update_table(rows)
    parts[0].merge(parts[1])
    assert_same(parts[0].table(), expert_criteria(EFFECTS, n_experts=N_EXPERTS))
    with pytest.raises(ValueError, match="accumulators differ"):
        parts[0].merge(CriteriaAccumulator((0, 1), N_EXPERTS))


def test_a_parquet_file_gives_what_the_table_gives(tmp_path):
    write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet", row_group_size=333)
    assert_same(expert_criteria(tmp_path / "effects.parquet", n_experts=N_EXPERTS), expert_criteria(EFFECTS, n_experts=N_EXPERTS))


def test_the_last_token_of_a_document_counts_though_it_has_no_delta():
    without = EFFECTS.filter(pa.compute.invert(pa.compute.is_nan(EFFECTS["delta_loss"])))
    full, cut = (expert_criteria(table, n_experts=N_EXPERTS)["n_tokens"].to_numpy() for table in (EFFECTS, without))
    assert full.sum() - cut.sum() == 6 * 3 * 4  # documents, layers, slots


def test_a_tiny_spread_on_a_large_norm_survives():
    """Sum-of-squares formulas lose everything here; the merge must not."""
    random = np.random.default_rng(0)
    norm = 1e6 + random.normal(0, 1e-3, 10_000)
    accumulator = CriteriaAccumulator([5], 1)
    for chunk in np.split(norm, 100):
        ones = np.ones(len(chunk))
        accumulator.update(5 * ones.astype(int), 0 * ones.astype(int), 0 * ones.astype(int), ones, chunk)
    assert accumulator.table()["activation_std"][0].as_py() == pytest.approx(norm.std(ddof=1), rel=1e-6)


def test_layers_not_asked_for_are_passed_over():
    accumulator = CriteriaAccumulator([2], N_EXPERTS)
    accumulator.update_table(EFFECTS)
    whole = expert_criteria(EFFECTS, n_experts=N_EXPERTS)
    assert_same(accumulator.table(), whole.filter(pa.compute.equal(whole["layer"], 2)))


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_counted_is_refused_by_name():
    accumulator = CriteriaAccumulator([0], 4)
    one = np.zeros(1, int)
    with pytest.raises(ValueError, match=r"expert 4 outside 0\.\.3"):
        accumulator.update(one, one, one + 4, np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="output_norm has 1 values that are NaN or infinite"):
        accumulator.update(one, one, one, np.ones(1), np.array([np.nan]))
    with pytest.raises(ValueError, match="columns differ in length"):
        accumulator.update(one, one, one, np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match=r"no token seen in layers \[0\]"):
        accumulator.table()
    with pytest.raises(ValueError, match="distinct layers"):
        CriteriaAccumulator([0, 0], 4)
    with pytest.raises(ValueError, match="no rows"):
        expert_criteria(EFFECTS.slice(0, 0), n_experts=4)
