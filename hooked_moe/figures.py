"""The figures of a run: each is a table of numbers and a drawing of it.

`*_numbers` turns effects or cells into the table that is saved beside the figure as csv; `draw_*` sees nothing but that
table. `run_drawings` lists them all with their captions.
"""

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hooked_moe.cells import CONTROL, POPULATIONS, Cell
from hooked_moe.criteria import CRITERIA, PAPER_CRITERIA
from hooked_moe.drawing import BLUE, VERMILLION, Drawing, layer_axis, panel_row, rows_where, slot_bar, slot_colour
from hooked_moe.effect_grid import EffectGrid

GREYS = dict(zip(PAPER_CRITERIA, (("#404040", "o"), ("#6b6b6b", "s"), ("#8c8c8c", "^"), ("#a8a8a8", "D")), strict=False))
MINIMUM_REMOVALS = 30  # a mean over fewer is not drawn in the heat map


def run_drawings(
    grid: EffectGrid, experts: pa.Table, cells: Sequence[Cell], layers: pa.Table, noise_floor: float | None
) -> list[Drawing]:
    """The figures of the report, in its order. `layers` is the table of `layer_summary`; `noise_floor` is in nats."""
    n_experts = int(experts.column("expert").to_numpy().max()) + 1
    position = [cell for cell in cells if cell.scope == "position"]
    few = f"grey: fewer than {MINIMUM_REMOVALS} removals"
    return [
        Drawing(
            "effect_size",
            "Does the ranking point at the expert that matters?",
            "Standardised difference in loss change between removing the active expert that a ranking puts highest and the "
            "one it puts lowest, over single positions, by layer. Grey: criteria fixed for the whole corpus; vermillion: "
            "the routing weight of the very token. Bands are 95% intervals: for the sample exact if positions were "
            "independent, for all positions by jackknife over documents. Dashed: the size that the sample detects with 80% "
            "power after correction.",
            effect_size_numbers(position),
            draw_effect_size,
        ),
        Drawing(
            "removal_effect",
            "What removing one expert does, by layer",
            "First the change of the next token's loss, absolute and signed; then how far the removal moves the block's "
            "output. Thin lines are the slots, thick ones all slots together.",
            layers,
            draw_removal_effect,
        ),
        Drawing(
            "slots",
            "Distribution of the loss change by slot",
            "All layers together. Boxes run from the 25th to the 75th percentile with the median in white, whiskers to "
            "the 5th and 95th, diamonds at the mean. Tails: share of removals that change the loss by more than x, either way.",
            slot_numbers(grid),
            functools.partial(draw_slots, noise_floor=noise_floor),
        ),
        Drawing(
            "experts",
            "Mean effect of every expert",
            "Mean loss change from removing an expert, over the tokens that select it. Orange: the model is worse without "
            f"it; purple: better; {few}. The scale is clipped at the 98th percentile.",
            expert_numbers(grid, n_experts),
            draw_experts,
        ),
    ]


# --- Figure 1: effect size by layer --------------------------------------------------------------------------------


def effect_size_numbers(cells: Sequence[Cell]) -> pa.Table:
    names = ("population", "ranking", "layer", "n", "d_position", "d_position_low", "d_position_high", "d_z", "outcome")
    rows = [{name: getattr(cell, name) for name in (*names, "minimal_detectable_d")} for cell in cells]
    return pa.Table.from_pylist(rows)


def draw_effect_size(numbers: pa.Table, narrow: bool) -> Figure:
    """d over single positions by layer: criteria in grey, the routing-weight control in colour, bands 95% intervals."""
    shown = [name for name in POPULATIONS if name in numbers.column("population").to_pylist()]
    figure, panels = panel_row(narrow, len(shown), 3.2, sharey=True)
    for i, (axes, population) in enumerate(zip(panels, shown, strict=True)):
        rows = rows_where(numbers, population=population)
        layers = np.unique(rows["layer"])
        axes.axhline(0, color="#222222", linewidth=0.8, zorder=1)
        for ranking in (*PAPER_CRITERIA, CONTROL):
            one = rows_where(numbers, population=population, ranking=ranking)
            control = ranking == CONTROL
            colour, marker = (VERMILLION, "o") if control else GREYS[ranking]
            band = axes.fill_between(
                one["layer"],
                one["d_position_low"],
                one["d_position_high"],
                color=colour,
                alpha=0.22 if control else 0.12,
            )
            band.set(linewidth=0, zorder=4 if control else 2)
            label = "control: the token's own routing weight" if control else CRITERIA[ranking].label
            axes.plot(
                one["layer"],
                one["d_position"],
                color=colour,
                marker=marker,
                markersize=5 if control else 4,
                linewidth=2 if control else 1.1,
                zorder=5 if control else 3,
                label=label if i == 0 else None,
            )
        n = rows["n"].max()
        if np.isnan(rows["d_position"]).all():
            axes.text(0.5, 0.5, "refused: see the table", transform=axes.transAxes, ha="center", va="center")
        if population == "sample":
            axes.set_title(f"{n} sampled positions")
            detectable = rows_where(numbers, population=population, ranking=next(iter(CRITERIA)))["minimal_detectable_d"]
            for sign in (-1, 1) if np.isfinite(detectable).all() else ():
                axes.axhline(sign * detectable.mean(), color=BLUE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            if np.isfinite(detectable).all():
                at = (0.99, detectable.mean())
                axes.annotate(
                    "80% power",
                    at,
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="right",
                    fontsize=7.5,
                    color=BLUE,
                )
        else:
            axes.set_title(f"all positions (n = {n} documents)")
        layer_axis(axes, layers, label=not narrow or i == len(shown) - 1)
        if narrow or i == 0:
            axes.set_ylabel("effect size d (high \N{MINUS SIGN} low)")
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
    return figure


# --- Figure 2: what a removal does, by layer -----------------------------------------------------------------------


def draw_removal_effect(numbers: pa.Table, narrow: bool) -> Figure:
    """Mean |delta|, mean delta and its 95th percentile, and gap norm, by layer; thin lines are single slots."""
    figure, (loss, gap) = panel_row(narrow, 2, 3.0)
    total = rows_where(numbers, slot=-1)
    slots = sorted(set(numbers.column("slot").to_pylist()) - {-1})
    for axes, name, label in ((loss, "mean_abs_delta", "mean |Δ loss|"), (gap, "mean_gap_norm", "gap norm")):
        for slot in slots:
            one = rows_where(numbers, slot=slot)
            axes.plot(one["layer"], one[name], color=slot_colour(slot, len(slots)), linewidth=0.9, zorder=2)
        axes.plot(total["layer"], total[name], color="black", linewidth=2.2, marker="o", markersize=4, label=label)
        layer_axis(axes, total["layer"], label=not narrow or axes is gap)
    loss.plot(
        total["layer"],
        total["mean_delta"],
        color=VERMILLION,
        linewidth=1.8,
        marker="s",
        markersize=4,
        label="mean Δ loss",
    )
    loss.axhline(0, color="#222222", linewidth=0.8, zorder=1)
    loss.set(ylabel="nats", title="change of the next token's loss")
    gap.set(ylabel="g ‖E(x)‖", title="change of the block's output")
    gap.set_ylim(bottom=0)
    bottom, top = loss.get_ylim()
    loss.set_ylim(bottom, top + 0.28 * (top - bottom))  # room for the legend
    loss.legend(loc="upper left")
    slot_bar(figure, [loss, gap], len(slots), narrow)
    return figure


# --- Figure 3: distribution by slot --------------------------------------------------------------------------------

CENTRE = (0.05, 0.25, 0.5, 0.75, 0.95)
TAIL = tuple(float(share) for share in np.logspace(0, -4, 41))


def slot_numbers(grid: EffectGrid) -> pa.Table:
    """Per slot, over all layers: mean and quantiles of delta_loss, and the |delta_loss| exceeded by a share of removals."""
    rows = []
    for slot in range(grid.n_slots):
        delta = grid.delta_loss[grid.valid, :, slot].ravel()
        rows.append({"slot": slot, "statistic": "mean", "level": np.nan, "nats": float(delta.mean(dtype=np.float64))})
        for level, value in zip(CENTRE, np.quantile(delta, CENTRE), strict=True):
            rows.append({"slot": slot, "statistic": "quantile of delta", "level": level, "nats": float(value)})
        size = np.abs(delta)
        shares = [share for share in TAIL if share * len(size) >= 5]
        for share, value in zip(shares, np.quantile(size, 1 - np.array(shares)), strict=True):
            rows.append({"slot": slot, "statistic": "abs delta exceeded by share", "level": share, "nats": float(value)})
    return pa.Table.from_pylist(rows)


def draw_slots(numbers: pa.Table, narrow: bool, noise_floor: float | None = None) -> Figure:
    """Boxes of delta_loss by slot (25-75%, whiskers 5-95%), and how often |delta_loss| exceeds a size."""
    figure, (boxes, tail) = panel_row(narrow, 2, 3.0)
    slots = sorted(set(numbers.column("slot").to_pylist()))
    for slot in slots:
        colour = slot_colour(slot, len(slots))
        low, first, median, third, high = rows_where(numbers, slot=slot, statistic="quantile of delta")["nats"]
        boxes.plot([slot, slot], [low, high], color=colour, linewidth=1.2, zorder=2)
        boxes.bar(slot, third - first, 0.62, first, color=colour, alpha=0.75, zorder=3)
        boxes.plot([slot - 0.31, slot + 0.31], [median, median], color="white", linewidth=1.6, zorder=4)
        mean = rows_where(numbers, slot=slot, statistic="mean")["nats"]
        boxes.plot(slot, mean, marker="D", color="black", markersize=4, zorder=5, linestyle="none")
        exceeded = rows_where(numbers, slot=slot, statistic="abs delta exceeded by share")
        tail.plot(exceeded["nats"], exceeded["level"], color=colour, linewidth=1.4)
    boxes.axhline(0, color="#222222", linewidth=0.8, zorder=1)
    boxes.set(xlabel="slot (0 = highest routing weight)", ylabel="Δ loss (nats)", title="middle 90% (diamond: mean)")
    boxes.set_xticks(slots if len(slots) <= 16 else slots[:: len(slots) // 8])
    smallest = 1e-5
    tail.set(xscale="log", yscale="log", xlabel="x (nats)", ylabel="share of removals with |Δ loss| > x", title="tails")
    if noise_floor:
        smallest = min(smallest, noise_floor / 2)
        tail.axvline(noise_floor, color=VERMILLION, linewidth=1, linestyle=(0, (4, 3)))
        tail.annotate(
            "noise floor",
            (noise_floor, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=VERMILLION,
        )
    tail.set_xlim(left=smallest)
    return figure


# --- Figure 4: experts ----------------------------------------------------------------------------------------------


def expert_numbers(grid: EffectGrid, n_experts: int) -> pa.Table:
    """Per layer and expert: removals and mean delta_loss in nats (NaN where it was never removed)."""
    tables = []
    for axis, layer in enumerate(grid.layers):
        expert = grid.expert[grid.valid, axis].ravel()
        count = np.bincount(expert, minlength=n_experts)
        total = np.bincount(expert, grid.delta_loss[grid.valid, axis].ravel(), n_experts)
        mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
        columns = {"layer": np.full(len(count), layer), "expert": np.arange(len(count))}
        tables.append(pa.table({**columns, "n_removals": count, "mean_delta": mean}))
    return pa.concat_tables(tables)


def draw_experts(numbers: pa.Table, narrow: bool) -> Figure:
    """Mean delta_loss of every expert in every layer; the colour scale is symmetric and clipped at the 98th percentile."""
    layers = np.unique(numbers.column("layer").to_numpy())
    values = numbers.column("mean_delta").to_numpy().reshape(len(layers), -1).copy()
    values[numbers.column("n_removals").to_numpy().reshape(values.shape) < MINIMUM_REMOVALS] = np.nan
    finite = np.abs(values[np.isfinite(values)])
    limit = float(np.quantile(finite, 0.98)) if len(finite) else 1.0
    limit = limit or 1.0
    width, row = (3.9, 0.22) if narrow else (7.4, 0.3)
    figure = Figure(figsize=(width, 1.15 + (0.45 if narrow else 0) + row * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="PuOr_r",
        norm=TwoSlopeNorm(0, -limit, limit),
        interpolation="nearest",
        origin="upper",
    )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    if len(layers) > 16:
        axes.set_yticks(range(0, len(layers), 4), [str(layer) for layer in layers[::4]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(9 if narrow else 17, integer=True))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    where = {"orientation": "horizontal", "aspect": 30} if narrow else {"aspect": 4 + 2 * len(layers), "pad": 0.015}
    ticks = MaxNLocator(4 if narrow else 6)
    bar = figure.colorbar(image, ax=axes, extend="both", extendfrac=0.03, ticks=ticks, **where)
    bar.set_label("mean Δ loss (nats)", fontsize=8)
    bar.outline.set_visible(False)
    return figure
