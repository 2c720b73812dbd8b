"""How all figures are drawn: style, panels, axes and colours, and files that repeat byte for byte.

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hooked_moe.figures import BLACK as BLACK
from hooked_moe.figures import BLUE as BLUE
from hooked_moe.figures import GREEN as GREEN
from hooked_moe.figures import GREY as GREY
from hooked_moe.figures import PURPLE as PURPLE
from hooked_moe.figures import SKY as SKY
from hooked_moe.figures import SMALL as SMALL
from hooked_moe.figures import STYLE as STYLE
from hooked_moe.figures import VERMILLION as VERMILLION
from hooked_moe.tables import atomic_path, write_csv_atomic

WIDE, NARROW = 7.4, 3.9  # inches
FILES = ("svg", "png", "csv")
DOTS_PER_INCH = 200  # of the PNG

LEGEND_BELOW: Any = {"loc": "outside lower center", "handlelength": 2.4, "columnspacing": 1.6}


@dataclass(frozen=True)
class Pictures:
    """A figure as svg, for a page and for a phone."""

    wide: bytes
    narrow: bytes


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: file stem, title, caption, the table of its numbers, and a function of (numbers, narrow)."""

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
            figure.set_dpi(DOTS_PER_INCH)
            layout = figure.get_layout_engine()
            assert layout is not None
            layout.execute(figure)
            figure.set_layout_engine("none")  # laid out once, for every format alike
            for kind in kinds:
                buffer = io.BytesIO()  # written by the canvas: savefig would draw everything twice
                if kind == "svg":
                    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
                else:
                    figure.set_dpi(DOTS_PER_INCH)  # print_svg leaves 72
                    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
                files[kind] = buffer.getvalue()
        return files

    def save(self, directory: Path) -> Pictures:
        """Write `name` with each of the endings `FILES` into `directory`; the svg there is the wide one."""
        files = self.render("svg", "png")
        for kind, content in files.items():
            with atomic_path(directory / f"{self.name}.{kind}") as temporary:
                temporary.write_bytes(content)
        write_csv_atomic(self.numbers, directory / f"{self.name}.csv")
        return Pictures(files["svg"], self.render("svg", narrow=True)["svg"])


def panel_row(
    narrow: bool, count: int, height: float, legend_lines: tuple[int, int] = (0, 0), **options: object
) -> tuple[Figure, Sequence[Axes]]:
    """`count` panels in a row, or stacked when narrow; `height` in inches, of one row.

    `legend_lines` is how many lines a legend below has, when wide and when narrow; they add to the height.
    """
    legend = 0.2 * legend_lines[narrow] + (0.1 if legend_lines[narrow] else 0)
    size = (NARROW, height * count * 0.92 + legend) if narrow else (WIDE, height + legend)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1 if narrow else 0.04))
    rows, columns = (count, 1) if narrow else (1, count)
    axes = figure.subplots(rows, columns, squeeze=False, **options)  # type: ignore[call-overload]
    return figure, list(axes.ravel())


def with_relative_depth(table: pa.Table, n_layers: int) -> pa.Table:
    """The table and a column "relative_depth" of its layers: 0 for the model's first, 1 for its last."""
    depth = table.column("layer").to_numpy() / max(n_layers - 1, 1)
    return table.append_column("relative_depth", pa.array(depth))


def rows_where(table: pa.Table, **equal: object) -> dict[str, np.ndarray]:
    """Columns of the rows whose named columns equal the given values."""
    keep = np.ones(table.num_rows, bool)
    for name, value in equal.items():
        keep &= np.array(table.column(name).to_pylist(), dtype=object) == value
    return {name: np.array(table.column(name).to_pylist())[keep] for name in table.column_names}


def distinct(table: pa.Table, name: str) -> list[Any]:
    """The values of a column, each once, in the order of the rows."""
    return list(dict.fromkeys(table.column(name).to_pylist()))


def line_with_band(
    axes: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str,
    marker: str,
    label: str | None,
    above: int = 3,
    **style: object,
) -> None:
    """A line with markers over the band of its interval; `above` orders lines, the higher on top."""
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=above - 0.5)
    options: dict[str, Any] = {"linewidth": 1.7, "markersize": 4.5, "markevery": marker_step(len(x)), **style}
    axes.plot(x, middle, color=colour, marker=marker, label=label, zorder=above, **options)


def marker_step(points: int) -> int:
    """The step from a marker to the next: every point of a short line has one, a dozen points of a long line."""
    return max(1, points // 12)


def zero_line(axes: Axes) -> None:
    axes.axhline(0, color="#222222", linewidth=0.8, zorder=1)


def layer_axis(axes: Axes, layers: Int[np.ndarray, " layer"], label: bool = True) -> None:
    if label:
        axes.set_xlabel("layer")
    if len(layers) <= 12:
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def depth_axes(axes: Axes, layers: Int[np.ndarray, " layer"], n_layers: int) -> np.ndarray:
    """Relative depth (layer / last layer) below and the layers' numbers above; returns the depths.

    A model of one layer has depth 0 throughout.
    """
    depth = layers / max(n_layers - 1, 1)
    axes.set(xlim=(-0.04, 1.04), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="relative depth")
    top = axes.twiny()
    labelled = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 9)).round().astype(int))
    top.set(xlim=axes.get_xlim(), xticks=depth[labelled])
    top.set_xticklabels([str(layer) for layer in layers[labelled]])
    top.tick_params(length=2.5, pad=1, labelsize=SMALL, colors=GREY)
    top.spines["top"].set(visible=True, color="#bbbbbb")
    top.annotate("layer", (1, 1), (0, 14), "axes fraction", "offset points", ha="right", fontsize=SMALL, color=GREY)
    return depth


def ordered_colour(index: int, count: int) -> tuple[float, float, float, float]:
    """The colour of the index-th of `count` ordered things: dark for the first."""
    return matplotlib.colormaps["viridis"](0.05 + 0.8 * index / max(count - 1, 1))


def ordered_bar(figure: Figure, panels: Sequence[Axes], values: Sequence[int], title: str, narrow: bool) -> None:
    """The legend of `ordered_colour`, as a bar of steps."""
    count = len(values)
    colours = matplotlib.colors.ListedColormap([ordered_colour(i, count) for i in range(count)])
    norm = matplotlib.colors.BoundaryNorm(np.arange(count + 1) - 0.5, count)
    mappable = matplotlib.cm.ScalarMappable(norm=norm, cmap=colours)
    ticks = list(range(count)) if count <= 12 else list(range(0, count, -(-count // 8)))
    where = {"orientation": "horizontal", "aspect": 30} if narrow else {"aspect": 22}
    bar = figure.colorbar(mappable, ax=list(panels), ticks=ticks, pad=0.03, shrink=0.85, **where)
    bar.set_ticklabels([str(values[tick]) for tick in ticks])
    bar.set_label(title, fontsize=SMALL)
    bar.outline.set_visible(False)
    if not narrow:
        bar.ax.invert_yaxis()
