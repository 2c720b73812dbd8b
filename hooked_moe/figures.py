"""How figures look wherever they are drawn, and the heat map that results draw of themselves.

Colours are Okabe and Ito's (2008), and maps run from purple over white to orange, which people with any colour vision tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

BLACK, BLUE, SKY, GREEN, VERMILLION, GREY = "#000000", "#0072B2", "#56B4E9", "#007a5a", "#D55E00", "#666666"
PURPLE = "#8f4a75"
SMALL = 8  # points; nothing in a figure is smaller
NOTHING = "#d9d9d9"  # where there is no value

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "hooked_moe",
}
_MOST_TICKS = 40
_DOTS_PER_INCH = 150


class NotebookFigure(Figure):
    """A figure that a notebook shows without `matplotlib.pyplot`; `savefig` writes it to a file."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self).print_png(buffer)
        return buffer.getvalue()


def heat_map(
    values: Float[np.ndarray, "row column"],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    row_label: str = "layer",
    column_label: str = "expert",
    value_label: str = "",
    title: str = "",
    limit: float | None = None,
    diverging: bool | None = None,
) -> NotebookFigure:
    """A heat map: one row per layer, say, and one column per expert or position.

    `rows` and `columns` are what stands at the axes' ticks: numbers, or texts such as tokens. NaN is grey: there is no value.
    `diverging` colours are white at zero and symmetric about it, which is the default where a value is negative; the others run
    from light to dark. `limit` is the size of value that has the strongest colour (default: the largest there is).

        heat_map(effects, rows=[0, 1], columns=range(16), value_label="mean Δ loss (nats)").savefig("effects.png")

    Raises `ValueError` where the labels are not as many as the values, and for a limit of 0 or less.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be above 0, not {limit}")
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values have shape {list(values.shape)}; there are {len(rows)} row and {len(columns)} column labels")
    finite = values[np.isfinite(values)]
    diverging = bool((finite < 0).any()) if diverging is None else diverging
    highest = limit or float(np.abs(finite).max(initial=0.0)) or 1.0
    norm = TwoSlopeNorm(0, -highest, highest) if diverging else Normalize(min(0.0, float(finite.min(initial=0.0))), highest)
    rotated = any(len(str(label)) > 3 for label in columns)
    with matplotlib.rc_context(STYLE):
        width = min(max(3.6, 1.9 + (0.24 if rotated else 0.2) * len(columns)), 12.0)
        height = min(max(1.7, 1.1 + 0.26 * len(rows) + (0.4 if rotated else 0)), 9.0)
        figure = NotebookFigure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(NOTHING)
        colours = "PuOr_r" if diverging else "YlGnBu"
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        _ticks(axes, rows, columns, rotated)
        axes.set(xlabel=column_label, ylabel=row_label)
        axes.set_title(title)
        axes.spines[:].set_visible(False)
        beyond = finite.size > 0 and float(np.abs(finite).max()) > highest
        bar = figure.colorbar(image, ax=axes, pad=0.02, extend=("both" if diverging else "max") if beyond else "neither")
        bar.set_label(value_label, fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
        bar.outline.set_visible(False)
    return figure


def _ticks(axes: Axes, rows: Sequence[object], columns: Sequence[object], rotated: bool) -> None:
    for axis, labels, angle in ((axes.yaxis, rows, 0), (axes.xaxis, columns, 90 if rotated else 0)):
        step = -(-len(labels) // _MOST_TICKS)
        texts = [_printable(str(label)) for label in labels[::step]]
        axis.set_ticks(range(0, len(labels), step), texts, rotation=angle, fontsize=SMALL)


def _printable(text: str) -> str:
    """A text as an axis shows it: without line breaks, and with no dollar sign that begins a formula."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
