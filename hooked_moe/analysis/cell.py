"""One cell of the audit, and tables of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.rankings import family_of


def _column(unit: str, meaning: str) -> Any:
    return field(metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True)
class Cell:
    """One ranking in one layer of one population. Statistics are NaN, and `note` says why, where outcome is "refused"."""

    scope: str = _column("text", "where the expert was removed: position (at the token alone) or sequence (everywhere)")
    population: str = _column("text", "sample (positions drawn once, as the paper) or all (every valid position)")
    ranking: str = _column(
        "text",
        "what ranks the experts: a criterion (the expert ranked lowest is the one that its source prunes first), a per-token "
        "score (the controls), or the oracle",
    )
    family: str = _column("text", "paper, extended, token or oracle: what is tested, and corrected for, together")
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
    n_tests: int = _column("tests", "cells corrected for: criteria of the family x layers, or layers for a token score or oracle")
    alpha: float = _column("1", "family-wise level")
    p_t_bonferroni: float = _column("1", "min(1, n_tests x p_t)")
    p_wilcoxon_bonferroni: float = _column("1", "min(1, n_tests x p_wilcoxon)")
    p_t_holm: float = _column("1", "p_t after Holm's step-down correction")
    p_wilcoxon_holm: float = _column("1", "p_wilcoxon after Holm's step-down correction")
    p_t_bh: float = _column("1", "p_t after Benjamini and Hochberg's step-up correction (false discovery rate)")
    p_max_t: float = _column("1", "sign flip over documents, adjusted by the largest |t| of the family's cells; population all")
    outcome: str = _column(
        "text",
        "agreement rule on the Bonferroni-adjusted p: positive or negative (both tests pass, one sign), tests_disagree, "
        "not_detected, or refused (see note)",
    )
    spearman: float = _column("1", "within-position rank correlation of ranking and loss change, mean over documents; all")
    spearman_low: float = _column("1", "lower end of its 95% interval, bootstrap over documents")
    spearman_high: float = _column("1", "upper end")
    bf10: float = _column("1", "JZS Bayes factor of the documents' slopes of loss change on score against none; population all")
    bf_directional: float = _column("1", "the same for a slope above 0, the right way round, against none")
    power_at_d02: float = _column(
        "1", "chance that this t-test detects a d_z of 0.2 at alpha / n_tests; of the sample, where d_z is over positions"
    )
    minimal_detectable_d: float = _column("1", "d_z that this t-test detects with 80% power; of the sample")
    note: str = _column("text", "why the cell was refused; empty otherwise")


def refused_cell(scope: str, population: str, ranking: str, layer: int, n_tests: int, alpha: float) -> Cell:
    """A cell with its identity filled in and every statistic undefined."""
    empty: dict[str, Any] = {column.name: np.nan if column.type is float else 0 for column in fields(Cell)}
    known: dict[str, Any] = {
        "scope": scope,
        "population": population,
        "ranking": ranking,
        "family": family_of(ranking),
        "layer": layer,
        "unit": "position" if population == "sample" else "document",
        "n_tests": n_tests,
        "alpha": alpha,
        "outcome": "refused",
        "note": "",
    }
    return Cell(**{**empty, **known})


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
