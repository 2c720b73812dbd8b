"""Measured against predicted rise in loss, a panel for each share pruned."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_moe.report.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    LEGEND_BELOW,
    SMALL,
    VERMILLION,
    Drawing,
    distinct,
    panel_row,
    rows_where,
)
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import preset_share

_KINDS = {
    "random": (GREY, "x", "experts at random"),
    "criterion": (BLUE, "o", "by a criterion"),
    "oracle": (GREEN, "D", "by an oracle (effects of other documents)"),
    "table": (VERMILLION, "^", "chosen by the effect table"),
}


def pruning(table: pa.Table) -> Drawing:
    return Drawing(
        "pruning",
        "Does the effect table predict what a pruning costs?",
        "Each mark is a pruning: the predicted rise in loss, the sum of the single-token effects of the experts removed, against "
        "the measured one, on documents that neither saw. Bars are 95% intervals over documents. On the dashed line the two are "
        "equal; above it the pruning costs more than the sum. The cheapest criterion is named.",
        table,
        draw_pruning,
    )


def draw_pruning(numbers: pa.Table, narrow: bool) -> Figure:
    shares = sorted(distinct(numbers, "share"))
    figure, panels = panel_row(narrow, len(shares), 2.9, (2, 4))
    for axes, part in zip(panels, shares, strict=True):
        for kind, (colour, marker, text) in _KINDS.items():
            rows = rows_where(numbers, share=part, kind=kind)
            if len(rows["rise"]):
                _draw_marks(axes, rows, colour, marker, text)
        _name_cheapest(axes, rows_where(numbers, share=part, kind="criterion"))
        axes.axline((0, 0), slope=1, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(f"{preset_share(part)} pruned")
        axes.set_xlabel("predicted rise (nats)")
        if narrow or axes is panels[0]:
            axes.set_ylabel("measured rise (nats)")
    by_text: dict[str, Any] = {}
    for axes in panels:
        by_text |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(by_text.values()), list(by_text), ncols=1 if narrow else 2, **LEGEND_BELOW)
    return figure


def _draw_marks(axes: Axes, rows: dict[str, np.ndarray], colour: str, marker: str, text: str) -> None:
    (x, x_low, x_high), (y, y_low, y_high) = (
        [rows[f"{name}{end}"].astype(float) for end in ("", "_low", "_high")] for name in ("predicted", "rise")
    )
    axes.errorbar(
        x,
        y,
        xerr=[x - x_low, x_high - x],
        yerr=[y - y_low, y_high - y],
        fmt=marker,
        color=colour,
        markersize=4.5,
        elinewidth=0.8,
        alpha=0.85,
        label=text,
        zorder=4 if marker == "x" else 3,  # crosses stay visible on top of other marks
    )


def _name_cheapest(axes: Axes, rows: dict[str, np.ndarray]) -> None:
    if not len(rows["rise"]):
        return
    at = int(np.argmin(rows["rise"].astype(float)))
    where = (float(rows["predicted"][at]), float(rows["rise"][at]))
    axes.annotate(label(rows["ranking"][at]), where, (8, -3), "data", "offset points", fontsize=SMALL, color=BLUE, va="top")
