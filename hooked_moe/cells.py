"""The audit as a query over the effect table: does a ranking of experts predict what their removal costs?

A cell is one ranking in one layer. At every position the ranking picks, among the k active experts, the one it puts
highest and the one it puts lowest; the cell asks whether removing the first changes the loss by more than removing the
second (arXiv 2606.10703, section 4). Rankings by a criterion are fixed for the whole corpus; the control ranks by the
routing weight of the very token.

Two populations answer it, from the same rows:
  sample  n positions drawn once and shared by all cells; each position is a pair. This is the paper's protocol.
  all     every valid position; pairs are averaged within a document and the documents are tested, so that the
          resemblance of positions within a document cannot pass for evidence.
d_z is at the scale of the unit tested, so the two populations' d_z are not comparable; `d_position`, the standardised
difference over single positions, is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from hooked_moe import statistics
from hooked_moe.criteria import CRITERIA
from hooked_moe.effect_grid import EffectGrid, Source, read_effects

CONTROL = "routing_weight"
POPULATIONS = ("sample", "all")


def _column(unit: str, meaning: str) -> Any:
    return field(metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True)
class Cell:
    """One ranking in one layer of one population. Statistics are NaN, and `note` says why, where outcome is "refused"."""

    scope: str = _column("text", "where the expert was removed: position (at the token alone) or sequence (everywhere)")
    population: str = _column("text", "sample (positions drawn once, as the paper) or all (every valid position)")
    ranking: str = _column("text", "criterion that ranks the experts; routing_weight is the control, per token")
    layer: int = _column("index", "transformer block, counted from 0")
    unit: str = _column("text", "what one pair is: position or document")
    n: int = _column("pairs", "pairs tested")
    n_positions: int = _column("positions", "positions behind the pairs")
    n_undefined: int = _column("positions", "positions left out because the criterion of an active expert is undefined")
    n_ties: int = _column("positions", "positions where the highest or lowest was shared; the lower slot was taken")
    mean_high: float = _column("nats", "mean over units of delta_loss with the highest-ranked active expert removed")
    mean_low: float = _column("nats", "the same for the lowest-ranked active expert")
    mean_difference: float = _column("nats", "mean_high - mean_low; above 0 where the ranking points the right way")
    sd_difference: float = _column("nats", "standard deviation (ddof=1) of the differences over units")
    d_z: float = _column("1", "mean_difference / sd_difference: Cohen's d of the paired difference, at the unit tested")
    d_z_low: float = _column("1", "lower end of its exact 95% interval (noncentral t)")
    d_z_high: float = _column("1", "upper end")
    d_position: float = _column("1", "mean / sd of the differences over single positions; equals d_z in the sample")
    d_position_low: float = _column("1", "lower end of its 95% interval; jackknife over documents in population all")
    d_position_high: float = _column("1", "upper end")
    t: float = _column("1", "paired t statistic, n - 1 degrees of freedom")
    p_t: float = _column("1", "two-sided p of the t-test")
    p_wilcoxon: float = _column("1", "two-sided p of Wilcoxon's signed-rank test; zero differences dropped")
    n_zero: int = _column("pairs", "pairs with a difference of exactly 0")
    n_tests: int = _column("tests", "cells in the family corrected for: criteria x layers, or layers for the control")
    alpha: float = _column("1", "family-wise level")
    p_t_bonferroni: float = _column("1", "min(1, n_tests x p_t)")
    p_wilcoxon_bonferroni: float = _column("1", "min(1, n_tests x p_wilcoxon)")
    p_t_holm: float = _column("1", "p_t after Holm's step-down correction")
    p_wilcoxon_holm: float = _column("1", "p_wilcoxon after Holm's step-down correction")
    outcome: str = _column(
        "text",
        "agreement rule on the Bonferroni-adjusted p: positive or negative (both tests pass, one sign), tests_disagree, "
        "not_detected, or refused (see note)",
    )
    power_at_d02: float = _column("1", "chance that this t-test detects a d_z of 0.2 at alpha / n_tests")
    minimal_detectable_d: float = _column("1", "d_z that this t-test detects with 80% power")
    note: str = _column("text", "why the cell was refused; empty otherwise")


def sample_positions(n_valid: int, n: int, seed: int) -> Int[np.ndarray, " n"]:
    """Indices of the sampled positions among the valid ones: the draw of the released code, shared by all cells.

    Raises ValueError where the corpus has fewer than n valid positions.
    """
    if not statistics.MINIMUM_PAIRS <= n <= n_valid:
        raise ValueError(
            f"cannot sample {n} positions: the effect table has {n_valid} with a next token; choose between "
            f"{statistics.MINIMUM_PAIRS} and that many"
        )
    return np.random.RandomState(seed).permutation(n_valid)[:n]


def frozen_positions(grid: EffectGrid, n: int, seed: int) -> pa.Table:
    """The sampled (document, position) pairs, in the order drawn."""
    valid = np.flatnonzero(grid.valid)
    chosen = valid[sample_positions(len(valid), n, seed)]
    return pa.table({"document": grid.document[chosen], "position": grid.position[chosen]})


def audit_cells(
    effects: Source | EffectGrid,
    criteria: Source,
    layers: Sequence[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
    *,
    populations: Sequence[str] = POPULATIONS,
    alpha: float = 0.05,
    scope: str = "position",
) -> list[Cell]:
    """Every criterion and the routing-weight control, in every layer, for each population.

    `criteria` has columns layer, expert and one per name in CRITERIA (experts.parquet). Cells come ordered by
    population, ranking, layer. A cell whose statistics are undefined (constant criterion, too few documents) is
    returned with outcome "refused" and a note, and still counts in the family of tests.

    Raises ValueError for a malformed effect table, unknown layers or populations, an expert without criteria, and a
    sample larger than the corpus.
    """
    grid = read_effects(effects, columns=("expert", "delta_loss", "routing_weight"))
    if grid.routing_weight is None:
        raise ValueError("the effect table has no column routing_weight, which the control ranks by")
    chosen_layers = list(grid.layers) if layers is None else sorted(layers)
    if len(set(chosen_layers)) != len(chosen_layers) or not chosen_layers:
        raise ValueError(f"layers must be distinct and at least one, got {layers}")
    unknown = [name for name in populations if name not in POPULATIONS]
    if unknown:
        raise ValueError(f"unknown population {unknown[0]!r}; there are {', '.join(POPULATIONS)}")
    values = criterion_values(criteria)
    valid = np.flatnonzero(grid.valid)
    document = grid.document[valid]
    sample = sample_positions(len(valid), n_positions, seed) if "sample" in populations else None

    cells = []
    for layer in chosen_layers:
        axis = grid.layer_axis(layer)
        delta = grid.delta_loss[valid, axis]  # [position, slot]
        for ranking, score in _scores(values, layer, grid.expert[valid, axis], grid.routing_weight[valid, axis]):
            picked = _Picked.from_scores(score, delta)
            n_tests = len(chosen_layers) * (1 if ranking == CONTROL else len(CRITERIA))
            for population in populations:
                blank = _refused(scope, population, ranking, layer, n_tests, alpha)
                if population == "sample":
                    cells.append(_sample_cell(blank, picked.take(sample)))
                else:
                    cells.append(_document_cell(blank, picked, document))
    order = {name: i for i, name in enumerate((*CRITERIA, CONTROL))}
    cells.sort(key=lambda cell: (populations.index(cell.population), order[cell.ranking], cell.layer))
    return _adjusted(cells)


def criterion_values(criteria: Source) -> dict[str, dict[int, Float[np.ndarray, " expert"]]]:
    """Criterion name -> layer -> value per expert. Raises ValueError for absent columns and absent or repeated experts."""
    table = criteria if isinstance(criteria, pa.Table) else pq.read_table(criteria, use_threads=False)
    missing = [name for name in ("layer", "expert", *CRITERIA) if name not in table.column_names]
    if missing:
        raise ValueError(f"not a table of criteria: column {', '.join(missing)} missing; it has {table.column_names}")
    layer, expert = (table.column(name).to_numpy().astype(np.int64) for name in ("layer", "expert"))
    result: dict[str, dict[int, np.ndarray]] = {name: {} for name in CRITERIA}
    for one in np.unique(layer):
        rows = np.flatnonzero(layer == one)
        rows = rows[np.argsort(expert[rows], kind="stable")]
        if not np.array_equal(expert[rows], np.arange(len(rows))):
            raise ValueError(f"layer {one} of the criteria must have each expert once, counted from 0")
        for name in CRITERIA:
            result[name][int(one)] = table.column(name).to_numpy()[rows].astype(np.float64)
    return result


def _scores(
    values: dict[str, dict[int, np.ndarray]],
    layer: int,
    expert: Int[np.ndarray, "position slot"],
    routing_weight: Float[np.ndarray, "position slot"],
) -> Iterator[tuple[str, Float[np.ndarray, "position slot"]]]:
    """Each ranking's name and its score of every active expert."""
    for name, by_layer in values.items():
        if layer not in by_layer or expert.min() < 0 or expert.max() >= len(by_layer[layer]):
            known = f"has {len(by_layer[layer])} experts" if layer in by_layer else "has no row"
            raise ValueError(f"the table of criteria {known} in layer {layer}; effects go up to expert {expert.max()}")
        yield name, by_layer[layer][expert]
    yield CONTROL, routing_weight


@dataclass(frozen=True)
class _Picked:
    """What a ranking picked at each position: loss changes of its highest and lowest expert."""

    high: Float[np.ndarray, " position"]
    low: Float[np.ndarray, " position"]
    tied: np.ndarray  # bool; an extreme was shared
    undefined: np.ndarray  # bool; an active expert has no score

    @classmethod
    def from_scores(cls, score: Float[np.ndarray, "P K"], delta: Float[np.ndarray, "P K"]) -> "_Picked":
        """argmax and argmin take the first of equals, which is the lower slot."""
        undefined = np.isnan(score).any(axis=1)
        rows = np.arange(len(score))
        top, bottom = score.argmax(axis=1), score.argmin(axis=1)
        shared = [(score == score[rows, pick][:, None]).sum(axis=1) > 1 for pick in (top, bottom)]
        high, low = (delta[rows, pick].astype(np.float64) for pick in (top, bottom))
        return cls(high, low, shared[0] | shared[1], undefined)

    def take(self, index: np.ndarray | None) -> "_Picked":
        return _Picked(self.high[index], self.low[index], self.tied[index], self.undefined[index])


def _refused(scope: str, population: str, ranking: str, layer: int, n_tests: int, alpha: float) -> Cell:
    """A cell with its identity filled in and every statistic undefined."""
    empty: dict[str, Any] = {column.name: np.nan if column.type is float else 0 for column in fields(Cell)}
    known: dict[str, Any] = {
        "scope": scope,
        "population": population,
        "ranking": ranking,
        "layer": layer,
        "unit": "position" if population == "sample" else "document",
        "n_tests": n_tests,
        "alpha": alpha,
        "outcome": "refused",
        "note": "",
    }
    return Cell(**{**empty, **known})


def _sample_cell(blank: Cell, picked: _Picked) -> Cell:
    cell = _counted(blank, picked)
    keep = ~picked.undefined
    cell = _tested(cell, picked.high[keep], picked.low[keep])
    return replace(cell, d_position=cell.d_z, d_position_low=cell.d_z_low, d_position_high=cell.d_z_high)


def _document_cell(blank: Cell, picked: _Picked, document: Int[np.ndarray, " position"]) -> Cell:
    cell = _counted(blank, picked)
    keep = ~picked.undefined
    high, low = picked.high[keep], picked.low[keep]
    names, index, count = np.unique(document[keep], return_inverse=True, return_counts=True)
    needed = statistics.minimum_documents(cell.n_tests, cell.alpha)
    if len(names) < needed:
        note = f"{len(names)} documents; tests over documents at {cell.alpha:g}/{cell.n_tests} need at least {needed}"
        return replace(cell, n=len(names), note=note)
    by_document = [np.bincount(index, side) / count for side in (high, low)]
    cell = _tested(cell, *by_document)
    if cell.outcome == "refused":
        return cell
    single = statistics.clustered_dz(high - low, document[keep])
    return replace(cell, d_position=single.d, d_position_low=single.low, d_position_high=single.high)


def _counted(cell: Cell, picked: _Picked) -> Cell:
    kept = ~picked.undefined
    return replace(
        cell,
        n_positions=int(kept.sum()),
        n_undefined=int(picked.undefined.sum()),
        n_ties=int((picked.tied & kept).sum()),
    )


def _tested(cell: Cell, high: Float[np.ndarray, " unit"], low: Float[np.ndarray, " unit"]) -> Cell:
    """Fill in everything that one cell's pairs determine; outcome "refused" where they determine nothing."""
    cell = replace(cell, n=len(high))
    try:
        t_test, ranks = statistics.paired_t(high, low), statistics.wilcoxon_signed_rank(high, low)
        size = statistics.cohens_dz(high, low)
    except statistics.DegenerateSample as reason:
        return replace(cell, note=str(reason))
    level = cell.alpha / cell.n_tests
    return replace(
        cell,
        mean_high=float(high.mean()),
        mean_low=float(low.mean()),
        mean_difference=t_test.mean_difference,
        sd_difference=t_test.sd_difference,
        d_z=size.d,
        d_z_low=size.low,
        d_z_high=size.high,
        t=t_test.t,
        p_t=t_test.p,
        p_wilcoxon=ranks.p,
        n_zero=ranks.n_zero,
        outcome=statistics.agreement(t_test, ranks, cell.n_tests, cell.alpha),
        power_at_d02=statistics.power_paired_t(0.2, t_test.n, level),
        minimal_detectable_d=statistics.minimal_detectable_d(t_test.n, level),
    )


def _adjusted(cells: list[Cell]) -> list[Cell]:
    """Adjusted p-values; a family is one population's criterion cells, or its control cells."""
    families: dict[tuple[str, bool], list[int]] = {}
    for i, cell in enumerate(cells):
        families.setdefault((cell.population, cell.ranking == CONTROL), []).append(i)
    result = list(cells)
    for members in families.values():
        for test in ("p_t", "p_wilcoxon"):
            raw = np.array([getattr(cells[i], test) for i in members])
            for name, adjust in (("bonferroni", statistics.bonferroni), ("holm", statistics.holm)):
                for i, p in zip(members, adjust(raw, len(members)), strict=True):
                    adjusted: dict[str, Any] = {f"{test}_{name}": float(p)}
                    result[i] = replace(result[i], **adjusted)
    return result


def cells_table(cells: Sequence[Cell]) -> pa.Table:
    """The cells as a table, one row each, columns in the order of `Cell`."""
    kinds: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([pa.field(x.name, kinds[x.type], metadata=dict(x.metadata)) for x in fields(Cell)])
    return pa.Table.from_pylist([asdict(cell) for cell in cells], schema=schema)


def cells_from_table(table: pa.Table) -> list[Cell]:
    """The inverse of `cells_table`, also for a table read back from csv, where an empty text may come as null."""
    columns = {column.name: column for column in fields(Cell)}
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"not a table of cells: column {', '.join(missing)} missing")
    cells = []
    for row in table.select(list(columns)).to_pylist():
        values: dict[str, Any] = {name: "" if value is None else value for name, value in row.items()}
        cells.append(Cell(**values))
    return cells
