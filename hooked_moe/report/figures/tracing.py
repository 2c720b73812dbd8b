"""Causal tracing: what each layer restores, at one token or at several, and the candidates among its experts."""

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hooked_moe.report.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    LEGEND_BELOW,
    PURPLE,
    SKY,
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
WORDS = {
    "subject_first": "first token of the subject",
    "subject_middle": "middle of the subject",
    "subject_last": "last token of the subject",
    "after_subject": "between subject and last token",
    "final": "last token",
}
"""Places in a prompt, in its order."""
_PLACES = {
    "subject_first": (SKY, "v"),
    "subject_middle": (PURPLE, "D"),
    "subject_last": (VERMILLION, "s"),
    "after_subject": (GREY, "^"),
    "final": (BLUE, "o"),
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


def tracing_places(findings: pa.Table) -> Drawing:
    return Drawing(
        "tracing",
        "Where in the prompt the answer comes back",
        "Logits of the true answer over the wrong one, read at the last token, that a patch of the clean run restores in the "
        "corrupted one at a single token: mean over the validation cases with 95% intervals, by the layer and the place of the "
        "patch. First panel: MLP outputs. Second: attention outputs. Third: the single expert that is chosen at each place.",
        findings,
        draw_tracing_places,
    )


def draw_tracing_places(numbers: pa.Table, narrow: bool) -> Figure:
    figure, panels = panel_row(narrow, 3, 2.6, (2, 3))
    for axes, quantity, title in zip(
        panels, ("MLP output", "attention output"), ("MLP outputs", "attention outputs"), strict=False
    ):
        for place, (colour, marker) in _PLACES.items():
            rows = rows_where(numbers, quantity=quantity, place=place)
            if len(rows["mean"]):
                values = (rows[column].astype(float) for column in ("mean", "low", "high"))
                line_with_band(axes, rows["layer"].astype(int), *values, colour=colour, marker=marker, label=None)
        layer_axis(axes, np.unique(rows_where(numbers, quantity=quantity)["layer"].astype(int)))
        zero_line(axes)
        axes.set_title(title)
    panels[0].set_ylabel("restored (logits)")
    _draw_chosen(panels[2], numbers)
    found = set(numbers["place"].to_pylist())
    lines = [
        Line2D([], [], color=colour, marker=marker, label=WORDS[place])
        for place, (colour, marker) in _PLACES.items()
        if place in found
    ]
    figure.legend(handles=lines, ncols=1 if narrow else 3, **LEGEND_BELOW)
    return figure


def _draw_chosen(axes: Axes, numbers: pa.Table) -> None:
    """The first candidate of each place."""
    candidates = [(rows_where(numbers, quantity="rescue", place=place), colour) for place, (colour, _) in _PLACES.items()]
    candidates = [(rows, colour) for rows, colour in candidates if len(rows["mean"])]
    for place, (rows, colour) in enumerate(candidates):
        axes.barh(place, rows["mean"][0], color=colour, alpha=0.75, height=0.7)
        axes.plot([rows["low"][0], rows["high"][0]], [place, place], color="black", linewidth=1.2)
    names = [f"L{rows['layer'][0]}E{rows['expert'][0]}" for rows, _ in candidates]
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_xlabel("restored (logits)")
    axes.set_title("single experts")


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
