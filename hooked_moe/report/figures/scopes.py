"""Scope of the removal: the expert taken out at the token alone, or at every token of the sequence."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from hooked_moe.report.figures.drawing import (
    BLUE,
    LEGEND_BELOW,
    VERMILLION,
    Drawing,
    layer_axis,
    marker_step,
    panel_row,
    zero_line,
)

DASHED = (0, (4, 2))


def scopes(table: pa.Table) -> Drawing:
    return Drawing(
        "scopes",
        "At the token alone, or in the whole sequence",
        "The same expert removed at one token, and at every token of its sequence that selects it; both read at the same "
        "position. First panel: mean absolute loss change of each, and of their difference. Second panel: how well one predicts "
        "the other. In the last layer the two are the same.",
        table,
        draw_scopes,
    )


def draw_scopes(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (size, agreement) = panel_row(narrow, 2, 2.8, (2, 5))
    columns = {name: numbers.column(name).to_numpy() for name in numbers.column_names}
    layers = columns["layer"]
    lines = {
        "mean_abs_position": (VERMILLION, "o", "-", "at the token alone"),
        "mean_abs_sequence": (BLUE, "s", "-", "in the whole sequence"),
        "mean_abs_gap": ("#555555", "D", DASHED, "their difference"),
    }
    style: Any = {"markersize": 4.5, "linewidth": 1.7, "markevery": marker_step(len(layers))}
    for name, (colour, marker, dashes, text) in lines.items():
        size.plot(layers, columns[name], color=colour, marker=marker, linestyle=dashes, label=text, **style)
    agreement.plot(layers, columns["correlation"], color="black", marker="o", label="correlation", **style)
    agreement.plot(
        layers, columns["same_sign"], color="#777777", marker="s", linestyle=DASHED, label="share of equal sign", **style
    )
    size.set_ylim(bottom=0)
    agreement.set_ylim(min(0.0, np.nanmin(columns["correlation"]) - 0.05), 1.05)
    zero_line(agreement)
    size.set(title="size", ylabel="mean |Δ loss| (nats)")
    agreement.set(title="agreement", ylabel="correlation, share")
    for axes in (size, agreement):
        layer_axis(axes, layers)
    figure.legend(ncols=1 if narrow else 3, **LEGEND_BELOW)
    return figure
