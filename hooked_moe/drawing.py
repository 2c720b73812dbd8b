"""How figures are drawn, whatever they show: style, panels, axes and colours, and files that repeat byte for byte.

Drawings come wide (panels side by side, for a page) and narrow (stacked, for a phone). Colours are Okabe and Ito's
(2008), lines differ in marker as well as in colour, and the files carry no date, so that a rerun gives the same bytes.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hooked_moe.tables import atomic_path, write_csv_atomic

BLUE, VERMILLION = "#0072B2", "#D55E00"

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
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: file stem, caption, alternative text, numbers, and a function of (numbers, narrow)."""

    name: str
    title: str
    caption: str
    numbers: pa.Table
    draw: Callable[[pa.Table, bool], Figure]

    def render(self, *kinds: str, narrow: bool = False) -> dict[str, bytes]:
        """The figure as "svg" or "png" bytes, the same for the same numbers."""
        files = {}
        with matplotlib.rc_context(STYLE):
            figure = self.draw(self.numbers, narrow)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, for every format alike
            for kind in kinds:
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
                files[kind] = buffer.getvalue()
        return files

    def save(self, directory: Path) -> bytes:
        """Write `name`.svg, .png and .csv into `directory`; returns the svg."""
        files = self.render("svg", "png")
        for kind, content in files.items():
            with atomic_path(directory / f"{self.name}.{kind}") as temporary:
                temporary.write_bytes(content)
        write_csv_atomic(self.numbers, directory / f"{self.name}.csv")
        return files["svg"]


def panel_row(narrow: bool, count: int, height: float, **options: object) -> tuple[Figure, Sequence[Axes]]:
    """`count` panels in a row, or stacked when narrow. Sizes in inches; a narrow page is 3.9 wide, a wide one 7.4."""
    size = (3.9, height * count * 0.92) if narrow else (7.4, height)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1 if narrow else 0.04))
    rows, columns = (count, 1) if narrow else (1, count)
    axes = figure.subplots(rows, columns, squeeze=False, **options)  # type: ignore[call-overload]
    return figure, list(axes.ravel())


def rows_where(table: pa.Table, **equal: object) -> dict[str, np.ndarray]:
    """Columns of the rows whose named columns equal the given values."""
    keep = np.ones(table.num_rows, bool)
    for name, value in equal.items():
        keep &= np.array(table.column(name).to_pylist(), dtype=object) == value
    return {name: np.array(table.column(name).to_pylist())[keep] for name in table.column_names}


def layer_axis(axes: Axes, layers: Int[np.ndarray, " layer"], label: bool = True) -> None:
    if label:
        axes.set_xlabel("layer")
    if len(layers) <= 12:
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def slot_colour(slot: int, count: int) -> tuple[float, float, float, float]:
    return matplotlib.colormaps["viridis"](0.08 + 0.84 * slot / max(count - 1, 1))


def slot_bar(figure: Figure, panels: Sequence[Axes], count: int, narrow: bool) -> None:
    colours = matplotlib.colors.ListedColormap([slot_colour(slot, count) for slot in range(count)])
    norm = matplotlib.colors.BoundaryNorm(np.arange(count + 1) - 0.5, count)
    mappable = matplotlib.cm.ScalarMappable(norm=norm, cmap=colours)
    ticks = list(range(count)) if count <= 12 else list(range(0, count, count // 8))
    where = {"orientation": "horizontal", "aspect": 30} if narrow else {"aspect": 22}
    bar = figure.colorbar(mappable, ax=list(panels), ticks=ticks, pad=0.03, shrink=0.85, **where)
    bar.set_label("slot (0 = highest routing weight)", fontsize=8)
    bar.outline.set_visible(False)
    if not narrow:
        bar.ax.invert_yaxis()
