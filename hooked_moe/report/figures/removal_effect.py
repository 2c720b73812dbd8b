"""What one removal does: by layer and rank, against the noise floor, and its distribution."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from hooked_moe.report.figures.drawing import (
    SMALL,
    VERMILLION,
    Drawing,
    layer_axis,
    marker_step,
    ordered_bar,
    ordered_colour,
    panel_row,
    rows_where,
    zero_line,
)

RANK = "rank by routing weight (0: highest)"


def removal_effect(layers: pa.Table) -> Drawing:
    return Drawing(
        "removal_effect",
        "What removing one expert does, by layer",
        "First the change of the next token's loss, absolute and signed; then how far the removal moves the block's output. "
        "Thin lines are the experts by rank of their routing weight, thick ones all together.",
        layers,
        draw_removal_effect,
    )


def draw_removal_effect(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (loss, gap) = panel_row(narrow, 2, 3.1)
    total = rows_where(numbers, slot=-1)
    slots = sorted(set(numbers.column("slot").to_pylist()) - {-1})
    line: Any = {"linewidth": 1.8, "markersize": 4, "markevery": marker_step(len(total["layer"]))}
    for axes, name, text in ((loss, "mean_abs_delta", "mean |Δ loss|"), (gap, "mean_gap_norm", "gap norm")):
        for slot in slots:
            rows = rows_where(numbers, slot=slot)
            axes.plot(rows["layer"], rows[name], color=ordered_colour(slot, len(slots)), linewidth=0.9, zorder=2)
        axes.plot(total["layer"], total[name], **(line | {"linewidth": 2.2}), color="black", marker="o", label=text)
        layer_axis(axes, total["layer"], label=not narrow or axes is gap)
    loss.plot(total["layer"], total["mean_delta"], **line, color=VERMILLION, marker="s", label="mean Δ loss")
    zero_line(loss)
    loss.set(ylabel="nats", title="change of the next token's loss")
    gap.set(ylabel="g‖E(x)‖", title="change of the block's output")
    gap.set_ylim(bottom=0)
    bottom, top = loss.get_ylim()
    loss.set_ylim(bottom, top + 0.28 * (top - bottom))  # room for the legend
    loss.legend(loc="upper left")
    ordered_bar(figure, [loss, gap], slots, RANK, narrow)
    return figure


def slots(table: pa.Table) -> Drawing:
    return Drawing(
        "slots",
        "Does the effect follow the rank by routing weight?",
        "Mean loss change from removing the expert of each rank by routing weight; rank 0 has the highest weight. Black: all "
        "layers together, with a 95% interval over documents; coloured: single layers.",
        table,
        draw_slots,
    )


def draw_slots(numbers: pa.Table, narrow: bool) -> Figure:
    figure, (axes,) = panel_row(narrow, 1, 3.1)
    layers = sorted(set(numbers.column("layer").to_pylist()) - {-1})
    for i, layer in enumerate(layers):
        rows = rows_where(numbers, layer=layer)
        axes.plot(rows["slot"], rows["mean_delta"], color=ordered_colour(i, len(layers)), linewidth=1.1, zorder=2)
    total = rows_where(numbers, layer=-1)
    middle, low, high = (total[name].astype(float) for name in ("mean_delta", "mean_delta_low", "mean_delta_high"))
    axes.errorbar(
        total["slot"],
        middle,
        [middle - low, high - middle],
        color="black",
        marker="o",
        markersize=4,
        linewidth=2.2,
        capsize=2,
        zorder=4,
    )
    zero_line(axes)
    layer_axis(axes, np.unique(numbers.column("slot").to_numpy()))
    axes.set(xlabel=RANK, ylabel="mean Δ loss (nats)")
    ordered_bar(figure, [axes], layers, "layer", narrow)
    return figure


def slot_distribution(table: pa.Table, noise_floor: float | None) -> Drawing:
    """The distribution of each rank's effects, and the noise floor (nats) where it is known."""
    return Drawing(
        "slot_distribution",
        "Distribution of the loss change by rank",
        "All layers together. Boxes run from the 25th to the 75th percentile with the median in white, whiskers to the 5th and "
        "95th, diamonds at the mean. Tails: share of removals that change the loss by more than x, up or down.",
        table,
        functools.partial(draw_slot_distribution, noise_floor=noise_floor),
    )


def draw_slot_distribution(numbers: pa.Table, narrow: bool, noise_floor: float | None = None) -> Figure:
    figure, (boxes, tail) = panel_row(narrow, 2, 3.1)
    slots = sorted(set(numbers.column("slot").to_pylist()))
    for slot in slots:
        colour = ordered_colour(slot, len(slots))
        low, first, median, third, high = rows_where(numbers, slot=slot, statistic="quantile of delta")["nats"]
        boxes.plot([slot, slot], [low, high], color=colour, linewidth=1.2, zorder=2)
        boxes.bar(slot, third - first, 0.62, first, color=colour, alpha=0.75, zorder=3)
        boxes.plot([slot - 0.31, slot + 0.31], [median, median], color="white", linewidth=1.6, zorder=4)
        mean = rows_where(numbers, slot=slot, statistic="mean")["nats"]
        boxes.plot(slot, mean, marker="D", color="black", markersize=4, zorder=5, linestyle="none")
        exceeded = rows_where(numbers, slot=slot, statistic="abs delta exceeded by share")
        tail.plot(exceeded["nats"], exceeded["level"], color=colour, linewidth=1.4)
    zero_line(boxes)
    boxes.set(xlabel=RANK, ylabel="Δ loss (nats)", title="middle 90% (diamond: mean)")
    boxes.set_xticks(slots if len(slots) <= 16 else slots[:: len(slots) // 8])
    smallest = 1e-5
    tail.set(xscale="log", yscale="log", xlabel="x (nats)", ylabel="share of removals with |Δ loss| > x", title="tails")
    if noise_floor:
        smallest = min(smallest, noise_floor / 2)
        tail.axvline(noise_floor, color=VERMILLION, linewidth=1, linestyle=(0, (4, 3)))
        at = (noise_floor, 0.03)
        tail.annotate("noise floor", at, (3, 0), ("data", "axes fraction"), "offset points", fontsize=SMALL, color=VERMILLION)
    tail.set_xlim(left=smallest)
    return figure
