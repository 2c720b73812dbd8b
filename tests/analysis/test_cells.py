"""Cells against slow loops over positions; planted effects found, outcomes as the rule says, undefined cells refused by name."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from hooked_moe import statistics, tables
from hooked_moe.analysis.cells import Cell, cells_from_table, cells_table
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import ROUTING_WEIGHT, TOKEN_LADDER, TOLD_THE_TOKEN
from hooked_moe.tables.effect_grid import effect_chunks
from tests.support.synthetic_effects import PLANTED_LAYER, synthetic_effects, synthetic_expert_weights
from tests.support.whole_tables import audit_cells, expert_criteria, frozen_positions, read_effects

N_EXPERTS = 16
EFFECTS = synthetic_effects()
CRITERIA_TABLE = expert_criteria(EFFECTS, n_experts=N_EXPERTS, expert_weights=synthetic_expert_weights())  # and no routing


def key(cell: Cell) -> tuple[str, str, int]:
    return cell.population, cell.ranking, cell.layer


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return audit_cells(EFFECTS, CRITERIA_TABLE)


def test_the_planted_effect_is_found_and_nothing_else(cells):
    for cell in cells:
        planted = cell.ranking in TOLD_THE_TOKEN or (cell.ranking in TOKEN_LADDER and cell.layer == PLANTED_LAYER)
        if cell.note:
            assert cell.outcome == "refused"
        else:
            assert cell.outcome == ("positive" if planted else "not_detected"), cell


def test_a_reversed_effect_is_called_negative():
    effects = synthetic_effects(effect=-0.8)
    found = {key(cell): cell for cell in audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS))}
    for population in ("sample", "all"):
        assert found[population, ROUTING_WEIGHT, PLANTED_LAYER].outcome == "negative"


def test_cells_come_in_order_with_their_families_counted(cells):
    rankings = [*CRITERIA, "routing_weight", "gap_norm", *TOLD_THE_TOKEN, "oracle"]
    assert [key(cell) for cell in cells] == [(p, r, layer) for p in ("sample", "all") for r in rankings for layer in (0, 1, 2)]
    for cell in cells:
        assert cell.n_tests == {"paper": 12, "extended": 36, "token": 3, "oracle": 3}[cell.family]
        if cell.outcome != "refused":
            assert cell.p_t_bonferroni == pytest.approx(min(1, cell.n_tests * cell.p_t))
            assert cell.p_t <= cell.p_t_bh <= cell.p_t_holm <= cell.p_t_bonferroni


def slow_pairs(effects: pa.Table, criteria: pa.Table, ranking: str, layer: int) -> list[tuple[int, int, float, float]]:
    """(document, position, delta without the highest, delta without the lowest), position by position."""
    values = {(row["layer"], row["expert"]): row for row in criteria.to_pylist()}
    positions: dict[tuple[int, int], list[dict]] = {}
    for row in effects.to_pylist():
        if row["layer"] == layer and not np.isnan(row["delta_loss"]):
            positions.setdefault((row["document"], row["position"]), []).append(row)
    pairs = []
    for (document, position), rows in positions.items():
        scores = [row[ROUTING_WEIGHT] if ranking == ROUTING_WEIGHT else values[layer, row["expert"]][ranking] for row in rows]
        if any(score is None or np.isnan(score) for score in scores):
            continue
        high, low = rows[scores.index(max(scores))], rows[scores.index(min(scores))]  # index: the first of equals
        pairs.append((document, position, high["delta_loss"], low["delta_loss"]))
    return pairs


def document_means(pairs: list[tuple[int, int, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    by_document: dict[int, list[tuple[float, float]]] = {}
    for document, _, high, low in pairs:
        by_document.setdefault(document, []).append((high, low))
    means = np.array([np.mean(values, axis=0) for values in by_document.values()])
    return means[:, 0], means[:, 1]


@pytest.mark.parametrize(
    "ranking", ["activation_norm", "activation_std", "reap", "coactivation", "router_row_norm", "routing_weight"]
)
def test_cells_equal_the_slow_loop(cells, ranking):
    layer = 1
    found = {key(cell): cell for cell in cells}
    pairs = slow_pairs(EFFECTS, CRITERIA_TABLE, ranking, layer)

    chosen = np.random.RandomState(42).permutation(len(pairs))[:200]
    high, low = (np.array([pairs[i][side] for i in chosen]) for side in (2, 3))
    sample = found["sample", ranking, layer]
    t, p = scipy.stats.ttest_rel(high, low)
    assert (sample.n, sample.unit) == (200, "position")
    assert (sample.mean_high, sample.mean_low) == pytest.approx((high.mean(), low.mean()))
    assert (sample.t, sample.p_t) == pytest.approx((t, p))
    assert sample.p_wilcoxon == pytest.approx(scipy.stats.wilcoxon(high, low).pvalue)
    assert sample.d_z == sample.d_position == pytest.approx((high - low).mean() / (high - low).std(ddof=1))

    tops, bottoms = document_means(pairs)
    every = found["all", ranking, layer]
    t, p = scipy.stats.ttest_rel(tops, bottoms)
    assert (every.n, every.n_positions, every.unit) == (24, 24 * 39, "document")
    assert (every.mean_high, every.mean_difference) == pytest.approx((tops.mean(), (tops - bottoms).mean()))
    assert (every.t, every.p_t) == pytest.approx((t, p))
    difference = np.array([one - other for *_, one, other in pairs])
    assert every.d_position == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert sample.minimal_detectable_d == pytest.approx(statistics.minimal_detectable_d(200, 0.05 / sample.n_tests))
    assert np.isnan(every.minimal_detectable_d)  # it would be of d over documents, beside a d over positions
    assert np.isnan(every.power_at_d02)


def test_ties_go_to_the_lower_slot_and_are_counted():
    criteria = CRITERIA_TABLE.to_pandas()
    criteria["utilization_rate"] = (criteria["expert"] >= 8).astype(float)  # two values only: ties nearly everywhere
    table = pa.Table.from_pandas(criteria, preserve_index=False)
    cell = audit_cells(EFFECTS, table, layers=[0], populations=["all"])[0]
    pairs = slow_pairs(EFFECTS, table, "utilization_rate", 0)
    assert cell.n_ties == cell.n_positions == len(pairs)  # four active experts, two values
    tops, bottoms = document_means(pairs)
    assert cell.mean_difference == pytest.approx((tops - bottoms).mean())


def test_a_constant_criterion_is_refused_and_still_counts_in_the_family():
    criteria = CRITERIA_TABLE.to_pandas()
    criteria.loc[criteria["layer"] == 1, "activation_norm"] = 1.0
    cells = audit_cells(EFFECTS, pa.Table.from_pandas(criteria, preserve_index=False))
    refused = [cell for cell in cells if cell.outcome == "refused"]
    refused = [cell for cell in refused if not cell.note.startswith("not measured")]
    assert [key(cell) for cell in refused] == [("sample", "activation_norm", 1), ("all", "activation_norm", 1)]
    assert all("all" in cell.note and "differences equal 0" in cell.note for cell in refused)
    assert all(cell.n_tests == 12 for cell in cells if cell.family == "paper")


def test_positions_with_an_undefined_criterion_are_left_out_and_counted():
    criteria = CRITERIA_TABLE.to_pandas()
    lost = (criteria["layer"] == 0) & (criteria["expert"] == 3)
    criteria.loc[lost, "activation_std"] = np.nan
    table = pa.Table.from_pandas(criteria, preserve_index=False)
    cells = {key(cell): cell for cell in audit_cells(EFFECTS, table)}
    grid = read_effects(EFFECTS)
    touched = int((grid.expert[grid.valid, 0] == 3).any(axis=1).sum())
    cell = cells["all", "activation_std", 0]
    assert (cell.n_undefined, cell.n_positions) == (touched, 24 * 39 - touched)
    pairs = slow_pairs(EFFECTS, table, "activation_std", 0)
    assert cell.n_positions == len(pairs)
    assert cell.d_position == pytest.approx(statistics.cohens_dz(*np.array(pairs).T[2:]).d)
    assert cell.t == pytest.approx(statistics.paired_t(*document_means(pairs)).t)
    chosen = np.random.RandomState(42).permutation(24 * 39)[:200]
    assert cells["sample", "activation_std", 0].n == 200 - int((grid.expert[grid.valid, 0] == 3).any(axis=1)[chosen].sum())
    assert cells["all", "activation_std", 1].n_undefined == 0


def test_too_few_documents_are_refused_with_the_number_needed():
    effects = synthetic_effects(n_documents=9)
    cells = audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS))
    needed = {"paper": 10, "extended": 11, "token": 10, "oracle": 10}  # 2 / 2^n <= 0.05 / n_tests, and 10 at the least
    for cell in cells:
        if cell.note.startswith("not measured"):
            continue
        assert (cell.outcome == "refused") == (cell.population == "all")
        if cell.population == "all":
            required = needed[cell.family]
            assert cell.note == f"9 documents; tests over documents at 0.05/{cell.n_tests} need at least {required}"
            assert np.isnan(cell.p_t)
            assert np.isnan(cell.d_position)


def test_null_cells_pass_at_no_more_than_their_level():
    """12 tables without any effect, a family of 12 cells each, at a family-wise level of .05."""
    false = {"sample": 0, "all": 0}
    for seed in range(12):
        effects = synthetic_effects(n_documents=16, n_tokens=16, effect=0.0, seed=seed)
        for cell in audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS)):
            if cell.family == "paper":
                false[cell.population] += cell.outcome in ("positive", "negative")
    assert max(false.values()) <= 3  # 0.6 expected at most: the rule wants two tests, and stays below its level


def test_layers_can_be_chosen_and_shrink_the_family():
    cells = audit_cells(EFFECTS, CRITERIA_TABLE, layers=[2, 0], populations=["sample"])
    assert {cell.n_tests for cell in cells if cell.family == "paper"} == {8}
    assert {(cell.layer, cell.n_tests) for cell in cells if cell.ranking == ROUTING_WEIGHT} == {(0, 2), (2, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [7]}, r"layer 7 is not in the effect table; it has layers \[0, 1, 2\]"),
        ({"layers": [1, 1]}, "layers must be distinct"),
        ({"populations": ["some"]}, "unknown population 'some'"),
        ({"n_positions": 937}, "cannot sample 937 positions: the effect table has 936"),
        ({"n_positions": 2}, "choose between 3 and"),
    ],
)
def test_audit_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        audit_cells(EFFECTS, CRITERIA_TABLE, **options)


def test_audit_refuses_criteria_that_do_not_fit():
    with pytest.raises(ValueError, match="effects go up to expert 14"):
        audit_cells(EFFECTS, CRITERIA_TABLE.filter(pa.compute.less(CRITERIA_TABLE["expert"], 10)))
    with pytest.raises(ValueError, match="column activation_std missing"):
        audit_cells(EFFECTS, CRITERIA_TABLE.drop_columns(["activation_std"]))
    with pytest.raises(ValueError, match="each expert once"):
        audit_cells(EFFECTS, CRITERIA_TABLE.slice(1))
    with pytest.raises(ValueError, match="lacks routing_weight"):
        expert_criteria(EFFECTS.drop_columns(["routing_weight"]), n_experts=N_EXPERTS)


def test_cells_survive_csv(cells, tmp_path):
    tables.write_csv_atomic(cells_table(cells), tmp_path / "cells.csv")
    back = cells_from_table(tables.read_csv(tmp_path / "cells.csv", cells_table([]).schema))
    for one, other in zip(cells, back, strict=True):
        np.testing.assert_equal(asdict(one), asdict(other))


def test_the_frozen_sample_is_a_draw_of_valid_positions_in_corpus_order():
    table = frozen_positions(read_effects(EFFECTS), 200, 42).to_pandas()
    valid = [(document, position) for document in range(24) for position in range(39)]
    expected = [valid[i] for i in np.random.RandomState(42).permutation(len(valid))[:200]]
    assert list(zip(table["document"], table["position"], strict=True)) == expected


def test_chunks_of_any_size_give_the_same_cells(cells, tmp_path, monkeypatch):
    """Chunks end within documents; sums of float64 in another order differ in their last digits."""
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet", row_group_size=700)
    small = lambda source, columns: effect_chunks(source, columns, rows=500)  # noqa: E731
    monkeypatch.setattr("tests.support.whole_tables.effect_chunks", small)
    for one, other in zip(cells, audit_cells(tmp_path / "effects.parquet", CRITERIA_TABLE), strict=True):
        for name, value in asdict(one).items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-7, abs=1e-12, nan_ok=True)
            assert asdict(other)[name] == expected, (key(one), name)


@pytest.mark.parametrize("ranking", ["activation_norm", "aimer", ROUTING_WEIGHT])
def test_rank_correlation_and_slopes_equal_the_slow_loop(cells, ranking):
    layer = PLANTED_LAYER
    values = {(row["layer"], row["expert"]): row for row in CRITERIA_TABLE.to_pylist()}
    rank_correlations: dict[int, list[float]] = {}
    points: dict[int, list[tuple[float, float]]] = {}
    for (document, _), rows in active_experts(layer).items():
        scores = [row[ROUTING_WEIGHT] if ranking == ROUTING_WEIGHT else values[layer, row["expert"]][ranking] for row in rows]
        if ranking == "aimer":  # its source prunes the highest first
            scores = [-score for score in scores]
        delta = [row["delta_loss"] for row in rows]
        rank_correlations.setdefault(document, []).append(scipy.stats.spearmanr(scores, delta).statistic)
        points.setdefault(document, []).extend(zip(scores - np.mean(scores), delta - np.mean(delta), strict=True))
    cell = next(cell for cell in cells if key(cell) == ("all", ranking, layer))
    assert cell.spearman == pytest.approx(np.mean([np.mean(one) for one in rank_correlations.values()]))
    assert cell.spearman_low < cell.spearman < cell.spearman_high
    slopes = [np.dot(x, y) / np.dot(x, x) for x, y in (np.array(one).T for one in points.values())]
    t = float(scipy.stats.ttest_1samp(slopes, 0).statistic)
    assert cell.bf10 == pytest.approx(statistics.jzs_bf10(t, len(slopes)), rel=1e-6)
    assert cell.bf_directional == pytest.approx(statistics.jzs_directional(t, len(slopes)), rel=1e-6)


def active_experts(layer: int) -> dict[tuple[int, int], list[dict]]:
    positions: dict[tuple[int, int], list[dict]] = {}
    for row in EFFECTS.to_pylist():
        if row["layer"] == layer and not np.isnan(row["delta_loss"]):
            positions.setdefault((row["document"], row["position"]), []).append(row)
    return positions


def test_the_sign_flip_takes_a_familys_cells_together(cells):
    """By the definition: documents' mean differences change sign together, and the largest |t| of the family counts."""
    family = [cell for cell in cells if (cell.population, cell.family) == ("all", "paper")]
    means = [document_means(slow_pairs(EFFECTS, CRITERIA_TABLE, cell.ranking, cell.layer)) for cell in family]
    difference = np.stack([high - low for high, low in means], axis=1)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(2000, len(difference)))
    flipped = signs[:, :, None] * difference
    t = np.abs(flipped.mean(axis=1) / flipped.std(axis=1, ddof=1) * np.sqrt(len(difference)))
    for cell in family:
        expected = np.mean(t.max(axis=1) >= abs(cell.t) - 1e-9)
        assert cell.p_max_t == pytest.approx(expected, abs=0.04)


def test_what_was_not_measured_is_refused_and_says_so(cells):
    for cell in cells:
        unmeasured = cell.ranking in ("mean_router_probability", "max_activation", "routing_entropy")
        assert (cell.note == "not measured: this run has no routing.parquet") == unmeasured
    without = EFFECTS.drop_columns(["first_order", "gap_norm"])
    for cell in audit_cells(without, CRITERIA_TABLE, layers=[0]):
        if cell.ranking in ("first_order", "gap_norm"):
            assert cell.note == f"not measured: the effect table has no column {cell.ranking}"
            assert cell.outcome == "refused"
    unsampled = EFFECTS.set_column(
        EFFECTS.schema.get_field_index("first_order"), "first_order", pa.nulls(EFFECTS.num_rows, pa.float32()).fill_null(np.nan)
    )
    first_order = [cell for cell in audit_cells(unsampled, CRITERIA_TABLE, layers=[0]) if cell.ranking == "first_order"]
    assert [cell.n_undefined for cell in first_order] == [200, 24 * 39]
    assert "0 pairs" in first_order[0].note
    assert "936 positions left out for an undefined score" in first_order[1].note


def test_the_oracle_ranks_by_other_documents_and_finds_experts_that_matter():
    """Half of the experts help everywhere; which half, only the loss changes of other documents tell."""
    helpful = np.arange(N_EXPERTS) % 2
    delta = EFFECTS["delta_loss"].to_numpy() + 0.05 * helpful[EFFECTS["expert"].to_numpy()].astype(np.float32)
    effects = EFFECTS.set_column(EFFECTS.schema.get_field_index("delta_loss"), "delta_loss", pa.array(delta))
    cells = audit_cells(effects, CRITERIA_TABLE, layers=[0, 1])
    assert {cell.outcome for cell in cells if cell.ranking == "oracle"} == {"positive"}
