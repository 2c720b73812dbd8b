"""Causal tracing: what each layer restores, and the candidates among its experts."""

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_moe.report.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    LEGEND_BELOW,
    VERMILLION,
    Drawing,
    layer_axis,
    line_with_band,
    panel_row,
    rows_where,
    zero_line,
)

_LINES = {
    "MLP output": (BLUE, "o"),
    "routed experts": (VERMILLION, "s"),
    "attention output": (GREY, "^"),
}


def tracing(findings: pa.Table) -> Drawing:
    return Drawing(
        "tracing",
        "What brings the answer back",
        "Logits of the true answer over the wrong one that a patch of the clean run restores in the corrupted one, mean over the "
        "validation cases with 95% intervals. First panel: a layer's MLP output, the experts that its clean run is routed to, "
        "and its attention output. Second panel: the candidates among single experts, beside the MLP output of their layer and "
        "those of all layers together: no expert can be expected to restore more than the last.",
        findings,
        draw_tracing,
    )


def draw_tracing(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (by_layer, by_expert) = panel_row(narrow, 2, 2.9, (1, 2))
    for name, (colour, marker) in _LINES.items():
        rows = rows_where(numbers, quantity=name)
        layers = rows["layer"].astype(int)
        values = (rows[column].astype(float) for column in ("mean", "low", "high"))
        line_with_band(by_layer, layers, *values, colour=colour, marker=marker, label=name)
    layer_axis(by_layer, layers)
    zero_line(by_layer)
    by_layer.set_ylabel("restored (logits)")
    by_layer.set_title("by layer")
    _draw_candidates(by_expert, numbers)
    figure.legend(ncols=2 if narrow else 3, **LEGEND_BELOW)
    return figure


def _draw_candidates(axes: Axes, numbers: pa.Table) -> None:
    experts = rows_where(numbers, quantity="rescue")
    blocks = rows_where(numbers, quantity="MLP output")
    together = rows_where(numbers, quantity="all MLP outputs together")
    names = [f"L{layer}E{expert}" for layer, expert in zip(experts["layer"], experts["expert"], strict=True)]
    of_layer = {int(layer): number for number, layer in enumerate(blocks["layer"])}
    ceilings = sorted({int(layer) for layer in experts["layer"]})
    bars = [(name, GREEN, *(experts[c][i] for c in ("mean", "low", "high"))) for i, name in enumerate(names)]
    bars += [(f"layer {n}", BLUE, *(blocks[c][of_layer[n]] for c in ("mean", "low", "high"))) for n in ceilings]
    bars += [("all layers", GREY, *(together[c][0] for c in ("mean", "low", "high")))]
    for place, (_, colour, mean, low, high) in enumerate(bars):
        axes.barh(place, mean, color=colour, alpha=0.75, height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1.2)
    axes.set_yticks(np.arange(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_xlabel("restored (logits)")
    axes.set_title("single experts, and what bounds them")
