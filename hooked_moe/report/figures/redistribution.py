"""Redistribution by depth: how far a removal moves the block's output, and whether the remaining experts make up for it."""

import pyarrow as pa
from matplotlib.figure import Figure

from hooked_moe.report.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    LEGEND_BELOW,
    VERMILLION,
    Drawing,
    depth_axes,
    line_with_band,
    marker_step,
    panel_row,
    with_relative_depth,
    zero_line,
)

_LINES = {
    "rho_weight_gap": (GREY, "D", "weight and gap norm g‖E‖ (in part an identity)"),
    "rho_weight_norm": (VERMILLION, "o", "weight and output norm ‖E‖ (no identity)"),
    "rho_gap_compensation": (BLUE, "s", "gap norm and relative compensation (both contain ‖c‖)"),
    "rho_gap_alignment": (GREEN, "^", "gap norm and alignment of the rest, cos(r, c)"),
}


def redistribution(table: pa.Table, n_layers: int) -> Drawing:
    """The correlations in every layer, on aligned rows; `n_layers` counts the model's layers."""
    return Drawing(
        "redistribution",
        "How far a removal moves the block, and what makes up for it",
        "First panel: mean gap norm g‖E‖, the length of the removed contribution, as in the paper's Figure 2. Second panel: "
        "Spearman correlations within an expert, mean over experts with 95% intervals. Gap norm contains the routing weight, so "
        "their correlation is in part an identity; that of the weight with the output norm is not. Relative compensation, ‖r‖ "
        "max(cos(r, c), 0) / ‖c‖, is what the rest r of the routed sum holds in the direction of the removed contribution c; "
        "it divides by the gap norm ‖c‖, which alone lowers their correlation, and the alignment cos(r, c) does not.",
        with_relative_depth(table, n_layers),
        draw_redistribution,
    )


def draw_redistribution(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (size, correlation) = panel_row(narrow, 2, 3.0, (4, 4))
    columns = {name: numbers.column(name).to_numpy() for name in numbers.column_names}
    layers, last = columns["layer"], columns["relative_depth"].max()
    n_layers = round(layers.max() / last) + 1 if last else 1
    depth = depth_axes(size, layers, n_layers)
    depth_axes(correlation, layers, n_layers)
    size.plot(
        depth,
        columns["mean_gap_norm"],
        color="black",
        marker="o",
        markersize=4.5,
        linewidth=1.7,
        markevery=marker_step(len(depth)),
    )
    size.set_ylim(bottom=0)
    size.set_ylabel("mean gap norm g‖E‖")
    size.set_title("size of the removed contribution", pad=18)
    for name, (colour, marker, text) in _LINES.items():
        values = (columns[f"{name}{end}"].astype(float) for end in ("", "_low", "_high"))
        line_with_band(correlation, depth, *values, colour=colour, marker=marker, label=text)
    zero_line(correlation)
    correlation.set_ylabel("Spearman correlation")
    correlation.set_title("what goes with what, by expert", pad=18)
    figure.legend(ncols=1, **LEGEND_BELOW)
    return figure
