"""From the released protocol's comparisons to its cells: the tests, effect sizes and decisions of Tables 1-6.

Both decisions are given for every cell: the t-test alone, which the published text reports, and the agreement of both tests,
which it states as its rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import scipy
from jaxtyping import Float

from hooked_moe import statistics
from hooked_moe.paper.published import CONTROL_RANKING

ALPHA = 0.05


def _column(unit: str, meaning: str) -> Any:
    return field(metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True)
class ReleasedCell:
    """One ranking in one layer. Statistics are NaN, and `note` says why, where they are undefined."""

    ranking: str = _column("text", "metric that ranks the experts; routing_weight is the control, per token")
    layer: int = _column("index", "transformer block, counted from 0")
    n: int = _column("pairs", "positions compared")
    mean_difference: float = _column("nats", "mean of high_delta - low_delta")
    d: float = _column("1", "mean over standard deviation of the differences; the divisor is the family's (`ddof`)")
    ddof: int = _column("1", "what the standard deviation divides by: n - ddof")
    d_low: float = _column("1", "lower end of the exact 95% interval of the population's d")
    d_high: float = _column("1", "upper end")
    p_t: float = _column("1", "two-sided p of the paired t-test")
    p_wilcoxon: float = _column("1", "two-sided p of Wilcoxon's signed-rank test")
    rho: float = _column("1", "Spearman of the ratio of scores and the difference; of the control only")
    n_tests: int = _column("tests", "cells that the correction counts")
    t_test_alone: str = _column("text", "significant or not at .05 / n_tests by the t-test")
    agreement: str = _column("text", "positive, negative, tests_disagree or not_detected, by both tests at that level")
    note: str = _column("text", "why the cell has no statistics; empty otherwise")


def released_cells(comparisons: pa.Table, ddof: int) -> list[ReleasedCell]:
    """A cell for each ranking and layer of `tables.COMPARISONS`, in order. `ddof` is the audit's; the control's is 1.

    Tests are corrected over the audit's cells, and over the control's layers separately.
    """
    rankings, layers = (np.asarray(comparisons[name].to_pylist()) for name in ("ranking", "layer"))
    keys = list(dict.fromkeys(zip(rankings.tolist(), layers.tolist(), strict=True)))
    cells = []
    for ranking, layer in keys:
        rows = (rankings == ranking) & (layers == layer)
        values = {name: comparisons[name].to_numpy()[rows] for name in ("high_delta", "low_delta", "high_score", "low_score")}
        n_tests = sum((other == CONTROL_RANKING) == (ranking == CONTROL_RANKING) for other, _ in keys)
        cells.append(_cell(ranking, layer, values, 1 if ranking == CONTROL_RANKING else ddof, n_tests))
    return cells


def _cell(ranking: str, layer: int, values: dict[str, Float[np.ndarray, " pair"]], ddof: int, n_tests: int) -> ReleasedCell:
    high, low = values["high_delta"], values["low_delta"]
    nan = float("nan")
    blank = ReleasedCell(
        ranking, layer, len(high), nan, nan, ddof, nan, nan, nan, nan, nan, n_tests, "undefined", "undefined", ""
    )
    try:
        t_test, ranks = statistics.paired_t(high, low), statistics.wilcoxon_signed_rank(high, low)
        size = statistics.cohens_dz(high, low, ddof=ddof)
    except statistics.DegenerateSample as reason:
        return ReleasedCell(**asdict(blank) | {"note": str(reason)})
    rho = nan
    if ranking == CONTROL_RANKING:
        ratio = values["high_score"] / (values["low_score"] + 1e-9)
        rho = float(scipy.stats.spearmanr(ratio, high - low).statistic)
    computed = {
        "mean_difference": t_test.mean_difference,
        "d": size.d,
        "d_low": size.low,
        "d_high": size.high,
        "p_t": t_test.p,
        "p_wilcoxon": ranks.p,
        "rho": rho,
        "t_test_alone": "significant" if t_test.p <= ALPHA / n_tests else "not significant",
        "agreement": statistics.agreement(t_test, ranks, n_tests, ALPHA),
    }
    return ReleasedCell(**asdict(blank) | computed)


def released_cells_table(cells: Sequence[ReleasedCell]) -> pa.Table:
    """A column per field of `ReleasedCell`, with its meaning."""
    kinds = {"str": pa.string(), "int": pa.int32(), "float": pa.float64()}
    schema = pa.schema(
        [pa.field(column.name, kinds[str(column.type)], metadata=dict(column.metadata)) for column in fields(ReleasedCell)]
    )
    return pa.Table.from_pylist([asdict(cell) for cell in cells], schema=schema)
