"""Which layers and parts carry the difference between two trainings: shares of grafts, in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hooked_moe.report.figures.drawing import (
    BLACK,
    BLUE,
    GREY,
    LEGEND_BELOW,
    NARROW,
    VERMILLION,
    WIDE,
    Drawing,
    layer_axis,
    line_with_band,
    panel_row,
    rows_where,
    zero_line,
)

_DIRECTIONS = {"a<-b": (BLUE, "o", "a with them from b: carried"), "b<-a": (VERMILLION, "s", "b without them: lost")}
_LAYER_SWEEPS = {"suffix": "layers from here on", "single": "this layer alone"}


def graft_layers(grafts: pa.Table, shares: pa.Table | None) -> Drawing:
    """By layer: suffixes, single layers, and exact Shapley shares where they were taken."""
    rows = [row for row in grafts.to_pylist() if row["sweep"] in _LAYER_SWEEPS]
    kept = [
        {
            "panel": row["sweep"],
            "layer": int(row["layers"].partition("-")[0]),
            "direction": row["direction"],
            **{name: row[name] for name in ("share", "share_low", "share_high")},
        }
        for row in rows
    ]
    for row in [] if shares is None else shares.to_pylist():
        if row["player"].startswith("layer "):
            ends = {name: row[name.replace("share", "shapley")] for name in ("share", "share_low", "share_high")}
            kept.append({"panel": "shapley", "layer": int(row["player"].split()[1]), "direction": "both", **ends})
    return Drawing(
        "graft_layers",
        "Which layers carry the difference?",
        "Share of the difference between the two trainings. Blue: a with the blocks of these layers taken from b. Red: what b "
        "loses when they are taken from a. Where the two differ, layers act together. Black: exact Shapley shares, the mean over "
        "all orders in which layers (and what is outside of blocks) can be taken. Bands are 95% intervals over documents or "
        "subjects; both trainings are fixed.",
        pa.Table.from_pylist(kept),
        draw_graft_layers,
    )


def draw_graft_layers(numbers: pa.Table, narrow: bool) -> Figure:
    panels = list(dict.fromkeys(numbers["panel"].to_pylist()))
    figure, axes_of = panel_row(narrow, len(panels), 2.8, (1, 3), sharey=True)
    for axes, panel in zip(axes_of, panels, strict=True):
        for direction, (colour, marker, text) in {**_DIRECTIONS, "both": (BLACK, "D", "Shapley share")}.items():
            rows = rows_where(numbers, panel=panel, direction=direction)
            if len(rows["layer"]):
                order = np.argsort(rows["layer"])
                values = [100 * rows[name][order].astype(float) for name in ("share", "share_low", "share_high")]
                line_with_band(axes, rows["layer"][order], *values, colour=colour, marker=marker, label=text)
        zero_line(axes)
        layer_axis(axes, np.unique(rows_where(numbers, panel=panel)["layer"]))
        axes.set_title({**_LAYER_SWEEPS, "shapley": "exact share"}[panel])
        if narrow or axes is axes_of[0]:
            axes.set_ylabel("share of the difference (%)")
    _legend(figure, axes_of, narrow)
    return figure


def graft_parts(grafts: pa.Table) -> Drawing:
    """By part, in all layers."""
    rows = [row for row in grafts.to_pylist() if row["sweep"] == "part"]
    names = ("parts", "direction", "share", "share_low", "share_high")
    return Drawing(
        "graft_parts",
        "Which parts carry the difference?",
        "The same for a part in all layers: what it is enough for (blue), and what is lost without it (red). 95% intervals over "
        "documents or subjects.",
        pa.Table.from_pylist([{name: row[name] for name in names} for row in rows]),
        draw_graft_parts,
    )


def draw_graft_parts(numbers: pa.Table, narrow: bool) -> Figure:
    parts = list(dict.fromkeys(numbers["parts"].to_pylist()))
    figure, (axes,) = panel_row(narrow, 1, 0.9 + 0.36 * len(parts), (1, 2))
    for offset, (direction, (colour, marker, text)) in zip((-0.13, 0.13), _DIRECTIONS.items(), strict=True):
        rows = rows_where(numbers, direction=direction)
        if not len(rows["parts"]):
            continue
        y = np.array([parts.index(part) for part in rows["parts"]]) + offset
        middle, low, high = (100 * rows[name].astype(float) for name in ("share", "share_low", "share_high"))
        axes.errorbar(middle, y, xerr=[middle - low, high - middle], fmt=marker, color=colour, markersize=4.5, label=text)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.set(yticks=range(len(parts)), xlabel="share of the difference (%)")
    axes.set_yticklabels([part.replace("_", " ") for part in parts])
    axes.invert_yaxis()
    _legend(figure, [axes], narrow)
    return figure


_HOSTS = ("a", "b")
_NULL_SOURCES = {
    "training": ("from the other training", "o"),
    "new": ("newly initialised", "^"),
    "seed": ("from another seed", "s"),
}


def graft_nulls(values: pa.Table) -> Drawing:
    """What the readout is with layers of `host` taken from each source; the table has these and the sweep."""
    return Drawing(
        "graft_nulls",
        "What the same layers cost that bring nothing",
        "The readout of a model with some of its layers changed, in its own unit: taken from the other training, as above; newly "
        "initialised; and, where one was given, taken from a training from another seed, whose heads, experts and neurons are "
        "numbered otherwise. Dotted: the model as it is. Bands are 95% intervals over documents or subjects.",
        values,
        draw_graft_nulls,
    )


def draw_graft_nulls(numbers: pa.Table, narrow: bool) -> Figure:
    sweeps = [sweep for sweep in _LAYER_SWEEPS if sweep in set(numbers["sweep"].to_pylist())]
    shape = (2 * len(sweeps), 1) if narrow else (len(sweeps), 2)
    size = (NARROW, 2.1 * shape[0] + 0.7) if narrow else (WIDE, 2.4 * shape[0] + 0.3)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for axes, (sweep, host) in zip(panels, itertools.product(sweeps, _HOSTS), strict=True):
        for source, (text, marker) in _NULL_SOURCES.items():
            colour = {"training": BLUE if host == "a" else VERMILLION, "new": GREY, "seed": BLACK}[source]
            rows = rows_where(numbers, sweep=sweep, host=host, source=source)
            if len(rows["layer"]):
                order = np.argsort(rows["layer"])
                values = [rows[name][order].astype(float) for name in ("value", "value_low", "value_high")]
                line_with_band(axes, rows["layer"][order], *values, colour=colour, marker=marker, label=text)
                axes.axhline(rows["host_value"][0], color="#222222", linewidth=0.8, linestyle=":", zorder=1)
        layer_axis(axes, np.unique(rows_where(numbers, sweep=sweep)["layer"]))
        axes.set_title(f"{host}, {_LAYER_SWEEPS[sweep]}")
        if narrow or host == "a":
            axes.set_ylabel("readout")
    _legend(figure, list(panels), narrow)
    return figure


def _legend(figure: Figure, panels: Sequence[Axes], narrow: bool) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    figure.legend(list(handles.values()), list(handles), ncols=1 if narrow else 3, **LEGEND_BELOW)
