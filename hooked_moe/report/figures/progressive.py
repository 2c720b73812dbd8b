"""Progressive ablation: loss change by how many active experts are removed at one token, in three orders."""

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hooked_moe.report.figures.drawing import (
    BLUE,
    GREEN,
    LEGEND_BELOW,
    NARROW,
    SMALL,
    VERMILLION,
    WIDE,
    Drawing,
    distinct,
    line_with_band,
    rows_where,
    zero_line,
)

ORDERS = {
    "descending": (VERMILLION, "o", "highest weight first"),
    "random": (BLUE, "s", "random order"),
    "ascending": (GREEN, "^", "lowest weight first"),
}
STATISTICS = {"mean": "mean", "median": "median", "p95": "95th percentile"}
_MOST_LAYERS = {False: 6, True: 3}  # columns that fit a page, and a phone


def progressive(table: pa.Table) -> Drawing:
    n = max(table.column("n_positions").to_pylist())
    return Drawing(
        "progressive",
        "Removing several experts at one token",
        f"Change of the next token's loss when the first 1, 2, ... active experts are removed together, over {n:,} positions: "
        "highest routing weight first, lowest first, or in random order. Bands: 95% intervals by bootstrap over documents. "
        "All orders meet where every active expert is removed. Up to six layers are drawn, spread over the depth; the csv has "
        "all of them.",
        table,
        draw_progressive,
    )


def draw_progressive(numbers: pa.Table, narrow: bool) -> Figure:
    every = np.unique(numbers.column("layer").to_numpy())
    count = min(len(every), _MOST_LAYERS[narrow])
    layers = every[np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))]
    width = NARROW if narrow else max(WIDE * min(1, 0.15 + 0.17 * len(layers)), NARROW)
    figure = Figure(figsize=(width, 5.8 if narrow else 5.4), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.05))
    grid = figure.subplots(len(STATISTICS), len(layers), sharex=True, sharey="row", squeeze=False)
    for panels, (statistic, title) in zip(grid, STATISTICS.items(), strict=True):
        for axes, layer in zip(panels, layers, strict=True):
            zero_line(axes)
            for above, order in enumerate(order for order in ORDERS if order in distinct(numbers, "order")):
                colour, marker, text = ORDERS[order]
                rows = rows_where(numbers, layer=layer, order=order)
                values = (rows[name].astype(float) for name in (statistic, f"{statistic}_low", f"{statistic}_high"))
                line_with_band(
                    axes, rows["removed"], *values, colour=colour, marker=marker, label=text, above=3 + above, markersize=3
                )
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panels[0].set_ylabel(f"{title} (nats)")
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer}")
    for axes in grid[-1]:
        axes.set_xlabel("removed")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=1 if narrow else 3, **(LEGEND_BELOW | {"fontsize": SMALL + 0.5}))
    return figure
