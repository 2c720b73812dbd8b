"""The mean effect of every expert of every layer, as a heat map."""

import numpy as np
import pyarrow as pa
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from hooked_moe.report.figures.drawing import NARROW, SMALL, WIDE, Drawing

MINIMUM_REMOVALS = 30  # a mean over fewer is not drawn
LABELLED = 10
"""Experts whose numbers are written into the map: those with the largest means."""
_WIDEST = 96  # experts of a layer; in a wider map numbers do not fit

_OUTLINE = [withStroke(linewidth=1.2, foreground="#000")]


def experts(table: pa.Table) -> Drawing:
    return Drawing(
        "experts",
        "Mean effect of every expert",
        "Mean loss change from removing an expert, over the tokens that select it. Orange: the model is worse without it; "
        f"purple: it is better; grey: fewer than {MINIMUM_REMOVALS} removals. The {LABELLED} largest means are numbered. The "
        "scale is clipped at the 98th percentile.",
        table.select(["layer", "expert", "n_removals", "mean_delta"]),
        draw_experts,
    )


def strongest(table: pa.Table, n: int = LABELLED) -> list[tuple[int, int]]:
    """Layer and expert of the largest means by size, the largest first."""
    layer, expert, count, mean = (table.column(name).to_numpy() for name in ("layer", "expert", "n_removals", "mean_delta"))
    size = np.where(count >= MINIMUM_REMOVALS, np.abs(mean.astype(float)), np.nan)
    order = np.argsort(-size, kind="stable")
    return [(int(layer[row]), int(expert[row])) for row in order[:n] if np.isfinite(size[row])]


def draw_experts(numbers: pa.Table, narrow: bool) -> Figure:
    """One row per layer, one column per expert; the colour scale is symmetric."""
    layer, expert, count, mean = (numbers.column(name).to_numpy() for name in ("layer", "expert", "n_removals", "mean_delta"))
    layers, rows = np.unique(layer, return_inverse=True)
    values = np.full((len(layers), expert.max() + 1), np.nan)
    values[rows, expert] = np.where(count >= MINIMUM_REMOVALS, mean.astype(float), np.nan)
    finite = np.abs(values[np.isfinite(values)])
    limit = (float(np.quantile(finite, 0.98)) if len(finite) else 0.0) or 1.0
    width, row = (NARROW, 0.22) if narrow else (WIDE, 0.3)
    row = min(row, 4.5 / len(layers))  # a deep model fits a page
    figure = Figure(figsize=(width, 1.15 + (0.45 if narrow else 0) + row * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(
        values, aspect="auto", cmap="PuOr_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest", origin="upper"
    )
    if values.shape[1] <= _WIDEST and row >= 0.12:
        for one, number in strongest(numbers):
            at = number, int(np.searchsorted(layers, one))
            axes.annotate(
                str(number), at, ha="center", va="center", fontsize=4 if narrow else 5.5, color="#fff", path_effects=_OUTLINE
            )
    step = 1 if len(layers) <= 16 else 4
    axes.set_yticks(range(0, len(layers), step), [str(number) for number in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(9 if narrow else 17, integer=True))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    where = {"orientation": "horizontal", "aspect": 30} if narrow else {"aspect": min(4 + 2 * len(layers), 30), "pad": 0.015}
    bar = figure.colorbar(image, ax=axes, extend="both", extendfrac=0.03, ticks=MaxNLocator(4 if narrow else 6), **where)
    bar.set_label("mean Δ loss (nats)", fontsize=SMALL)
    bar.outline.set_visible(False)
    return figure
