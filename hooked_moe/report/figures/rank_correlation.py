"""Rank correlation within a position: over all active experts, how well a ranking orders what their removal costs."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from hooked_moe.analysis.rankings import ORACLE, ROUTING_WEIGHT
from hooked_moe.report.figures.drawing import (
    LEGEND_BELOW,
    Drawing,
    distinct,
    layer_axis,
    line_with_band,
    panel_row,
    rows_where,
    zero_line,
)
from hooked_moe.report.figures.names import PAPER_LINES, SCORE_LINES, label

_KEPT = ("family", "ranking", "layer", "spearman", "spearman_low", "spearman_high")


def rank_correlation(cells: pa.Table) -> Drawing:
    """The correlations of every ranking over all positions, scope position."""
    keys = cells.select(["scope", "population"]).to_pylist()
    numbers = cells.filter(pa.array([row == {"scope": "position", "population": "all"} for row in keys])).select(_KEPT)
    return Drawing(
        "rank_correlation",
        "How well does it order all active experts?",
        "Spearman correlation, within a position and over all its active experts, between a ranking and the loss change of "
        "each removal; mean over documents with a 95% interval by bootstrap over documents. First panel: per-token scores, and "
        "the oracle, which ranks experts by their effect in other documents. Second panel, at another scale: criteria fixed "
        "for the whole corpus, with the routing weight and the oracle again; light lines are the further criteria.",
        numbers,
        draw_rank_correlation,
    )


def draw_rank_correlation(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (scores, fixed) = panel_row(narrow, 2, 2.9, (3, 9))
    layers = np.unique(numbers.column("layer").to_numpy())
    for ranking, (colour, marker) in SCORE_LINES.items():
        rows = rows_where(numbers, ranking=ranking)
        line_with_band(scores, rows["layer"], *_interval(rows), colour=colour, marker=marker, label=label(ranking))
        if ranking in (ROUTING_WEIGHT, ORACLE):  # to compare with, at the scale of the criteria
            line_with_band(fixed, rows["layer"], *_interval(rows), colour=colour, marker=marker, label=None)
    further = numbers.filter(pa.array([family == "extended" for family in numbers.column("family").to_pylist()]))
    for i, ranking in enumerate(distinct(further, "ranking")):
        rows = rows_where(further, ranking=ranking)
        text = "further criteria, a line each" if i == 0 else None
        fixed.plot(rows["layer"], rows["spearman"].astype(float), color="#c9c9c9", linewidth=1, zorder=2, label=text)
    for ranking, (colour, marker) in zip(_paper(numbers), PAPER_LINES, strict=False):
        rows = rows_where(numbers, ranking=ranking)
        thin: Any = {"linewidth": 1.2, "markersize": 3.5}
        line_with_band(fixed, rows["layer"], *_interval(rows), colour=colour, marker=marker, label=label(ranking), **thin)
    for axes, title in ((scores, "per-token scores"), (fixed, "criteria fixed for the corpus")):
        zero_line(axes)
        axes.set(title=title, ylabel="Spearman correlation")
        layer_axis(axes, layers)
    figure.legend(ncols=1 if narrow else 3, **LEGEND_BELOW)
    return figure


def _interval(rows: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [rows[name].astype(float) for name in ("spearman", "spearman_low", "spearman_high")]


def _paper(numbers: pa.Table) -> list[str]:
    rows = numbers.select(["family", "ranking"]).to_pylist()
    return list(dict.fromkeys(row["ranking"] for row in rows if row["family"] == "paper"))
