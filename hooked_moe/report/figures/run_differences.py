"""What each criterion saves in two runs: both with their intervals, one line for a criterion."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from hooked_moe.report.figures.drawing import BLUE, NARROW, SMALL, VERMILLION, WIDE, Drawing
from hooked_moe.report.figures.names import label

_SIDES = {"first": (BLUE, "o", -0.17), "second": (VERMILLION, "s", 0.17)}
_CLIP = (-1.05, 1.1)


def run_differences(rows: list[dict[str, object]]) -> Drawing:
    """`rows` are those of one effect, by falling saving of the first run."""
    names = ("quantity", *(f"{side}{end}" for side in _SIDES for end in ("", "_low", "_high")), "difference", "verdict")
    return Drawing(
        "run_differences",
        "What each criterion saves in either run",
        "Share of the cost of removing an active expert at random, realised loss, with 95% intervals over documents. Circles: "
        "the first run; squares: the second. Overlapping intervals do not mean that the runs agree: the differences in the "
        "table below are told more exactly.",
        pa.Table.from_pylist([{name: row[name] for name in names} for row in rows]),
        draw_differences,
    )


def draw_differences(numbers: pa.Table, narrow: bool) -> Figure:
    n = numbers.num_rows
    size = (NARROW, 1.3 + 0.21 * n) if narrow else (WIDE, 1.1 + 0.2 * n)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))
    axes = figure.subplots()
    axes.axvline(0, color="#222222", linewidth=0.8, zorder=1)
    for side, (colour, marker, shift) in _SIDES.items():
        middle, low, high = (
            np.clip(np.array(numbers.column(f"{side}{end}").to_pylist(), float), *_CLIP) for end in ("", "_low", "_high")
        )
        low, high = np.where(np.isnan(low), middle, low), np.where(np.isnan(high), middle, high)
        ends = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
        options: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 4, "elinewidth": 1.4, "zorder": 3}
        axes.errorbar(middle, np.arange(n) + shift, xerr=ends, label=f"{side} run", **options)
    axes.set_yticks(range(n), [label(name) for name in numbers.column("quantity").to_pylist()], fontsize=SMALL + 0.5)
    axes.set_ylim(n - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("saved, share of the random cost")
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    figure.legend(ncols=2, loc="outside upper center")
    return figure
