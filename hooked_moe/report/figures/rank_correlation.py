"""Rank correlation within a position: over all active experts, how well a ranking orders what their removal costs."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

_KEPT = ("effect", "family", "ranking", "layer", "spearman", "spearman_low", "spearman_high")
_EFFECTS = {"delta_loss": "realised loss", "kl": "expected loss (KL)"}


def rank_correlation(savings: pa.Table) -> Drawing:
    """The correlations of every ranking with both effects, layer by layer."""
    numbers = savings.select(_KEPT).filter(pa.array([layer != "all" for layer in savings.column("layer").to_pylist()]))
    layers = pa.array([int(layer) for layer in numbers.column("layer").to_pylist()])
    return Drawing(
        "rank_correlation",
        "How well does a ranking order all active experts?",
        "Spearman correlation, within a position and over all its active experts, between a ranking and the effect of each "
        "removal; mean over documents with a 95% interval by bootstrap over documents. First panel: the loss of the token that "
        "followed. Second panel, at another scale: its expectation, the KL divergence. Light lines are the further criteria. "
        "Criteria are taken in the direction in which they prune, so above 0 the order is the right one. The first-order "
        "estimate knows the token that followed; no other ranking does.",
        numbers.set_column(numbers.schema.get_field_index("layer"), "layer", layers),
        draw_rank_correlation,
    )


def draw_rank_correlation(numbers: pa.Table, narrow: bool) -> Figure:
    effects = distinct(numbers, "effect")
    figure, panels = panel_row(narrow, len(effects), 2.9, (4, 10))
    for axes, effect in zip(panels, effects, strict=True):
        _draw_effect(axes, numbers.filter(pa.array([name == effect for name in numbers.column("effect").to_pylist()])))
        zero_line(axes)
        axes.set(title=_EFFECTS[effect], ylabel="Spearman correlation")
        layer_axis(axes, np.unique(numbers.column("layer").to_numpy()))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=1 if narrow else 3, **LEGEND_BELOW)
    return figure


def _draw_effect(axes: Axes, numbers: pa.Table) -> None:
    thin: Any = {"linewidth": 1.2, "markersize": 3.5}
    for i, ranking in enumerate(_of_family(numbers, "extended")):
        rows = rows_where(numbers, ranking=ranking)
        text = "further criteria, a line each" if i == 0 else None
        axes.plot(rows["layer"], rows["spearman"].astype(float), color="#c9c9c9", linewidth=1, zorder=2, label=text)
    for ranking, (colour, marker) in zip(_of_family(numbers, "paper"), PAPER_LINES, strict=False):
        _draw_line(axes, numbers, ranking, colour, marker, **thin)
    for ranking, (colour, marker) in SCORE_LINES.items():
        if ranking in distinct(numbers, "ranking"):
            _draw_line(axes, numbers, ranking, colour, marker)


def _draw_line(axes: Axes, numbers: pa.Table, ranking: str, colour: str, marker: str, **style: Any) -> None:
    rows = rows_where(numbers, ranking=ranking)
    ends = [rows[name].astype(float) for name in ("spearman", "spearman_low", "spearman_high")]
    line_with_band(axes, rows["layer"], *ends, colour=colour, marker=marker, label=label(ranking), **style)


def _of_family(numbers: pa.Table, family: str) -> list[str]:
    rows = numbers.select(["family", "ranking"]).to_pylist()
    return list(dict.fromkeys(row["ranking"] for row in rows if row["family"] == family))
