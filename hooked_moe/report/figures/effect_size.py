"""Effect size by relative depth: the criteria as a grey band, the token's own routing weight on top."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_moe.analysis.rankings import ROUTING_WEIGHT
from hooked_moe.report.figures.drawing import (
    BLUE,
    LEGEND_BELOW,
    SMALL,
    VERMILLION,
    Drawing,
    depth_axes,
    distinct,
    line_with_band,
    marker_step,
    panel_row,
    rows_where,
    with_relative_depth,
    zero_line,
)
from hooked_moe.report.figures.names import PAPER_LINES, label

_KEPT = (
    *("population", "family", "ranking", "layer", "n", "d_position", "d_position_low", "d_position_high"),
    *("minimal_detectable_d", "outcome"),
)


def effect_size(cells: pa.Table, n_layers: int) -> Drawing:
    """Effect sizes of the paper's criteria and the control, scope position; `n_layers` counts the model's layers."""
    shown = [
        row["scope"] == "position" and (row["family"] == "paper" or row["ranking"] == ROUTING_WEIGHT)
        for row in cells.select(["scope", "family", "ranking"]).to_pylist()
    ]
    numbers = cells.filter(pa.array(shown)).select(_KEPT)
    return Drawing(
        "effect_size",
        "The paper's effect size, by depth",
        "As the paper's Figure 1: standardised difference d in loss change between removing the active expert that a ranking "
        "puts highest and the one it puts lowest, over single positions. Dark grey: the range of the paper's four criteria, "
        "each a thin line; light grey: the range of their 95% intervals. Vermillion: the token's own routing weight, "
        "with its 95% interval (for the sample exact if positions were independent, for all positions by jackknife over "
        "documents). Dashed: the size that the sample detects with 80% power after correction. d divides by the scatter of one "
        "realised token.",
        with_relative_depth(numbers, n_layers),
        draw_effect_size,
    )


def draw_effect_size(numbers: pa.Table, narrow: bool) -> Figure:
    populations = distinct(numbers, "population")
    figure, panels = panel_row(narrow, len(populations), 2.9, (4, 7), sharey=True)
    for axes, population in zip(panels, populations, strict=True):
        rows = rows_where(numbers, population=population)
        layers = np.unique(rows["layer"])
        last = rows["relative_depth"].max()
        depth = depth_axes(axes, layers, round(layers.max() / last) + 1 if last else 1)
        zero_line(axes)
        _draw_criteria(axes, numbers, population, depth)
        control = rows_where(numbers, population=population, ranking=ROUTING_WEIGHT)
        if len(control["layer"]):
            line_with_band(
                axes,
                depth,
                *(control[name] for name in ("d_position", "d_position_low", "d_position_high")),
                colour=VERMILLION,
                marker="o",
                label="control: the token's own routing weight",
                above=6,
            )
        if np.isnan(rows["d_position"].astype(float)).all():
            axes.text(0.5, 0.5, "refused: see the table", transform=axes.transAxes, ha="center", va="center")
        elif population == "sample":
            _mark_power(axes, float(np.nanmean(rows["minimal_detectable_d"])))
        n = rows["n"].max()
        title = f"{n} sampled positions" if population == "sample" else f"all positions (n = {n} documents)"
        axes.set_title(title, pad=18)
        if narrow or axes is panels[0]:
            axes.set_ylabel("effect size d (high \N{MINUS SIGN} low)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=1 if narrow else 2, **LEGEND_BELOW)
    return figure


def _draw_criteria(axes: Axes, numbers: pa.Table, population: str, depth: np.ndarray) -> None:
    """The envelope of the criteria's estimates, that of their intervals, and the estimates themselves."""
    by_criterion = [
        rows_where(numbers, population=population, ranking=ranking)
        for ranking in distinct(numbers, "ranking")
        if ranking != ROUTING_WEIGHT
    ]
    if not by_criterion:
        return
    d, low, high = (
        np.array([rows[name] for rows in by_criterion], float) for name in ("d_position", "d_position_low", "d_position_high")
    )
    defined = np.isfinite(d).any(axis=0)
    for floor, roof, shade, text in (
        (low, high, "#e6e6e6", "criteria: 95% intervals"),
        (d, d, "#c4c4c4", "criteria: range of d"),
    ):
        bottom = np.where(np.isfinite(floor), floor, np.inf).min(axis=0)[defined]
        top = np.where(np.isfinite(roof), roof, -np.inf).max(axis=0)[defined]
        axes.fill_between(depth[defined], bottom, top, color=shade, linewidth=0, zorder=2, label=text)
    for rows, (colour, marker) in zip(by_criterion, PAPER_LINES, strict=False):
        axes.plot(
            depth,
            rows["d_position"].astype(float),
            color=colour,
            marker=marker,
            markersize=3.5,
            markevery=marker_step(len(depth)),
            linewidth=1,
            zorder=4,
            label=label(rows["ranking"][0]),
        )


def _mark_power(axes: Axes, size: float) -> None:
    """Lines at plus and minus the d that the sample detects with 80% power."""
    for sign in (-1, 1):
        axes.axhline(sign * size, color=BLUE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    style: Any = {"va": "top", "fontsize": SMALL, "color": BLUE, "zorder": 7}
    axes.annotate("80% power", (0.01, -size), (0, -2), ("axes fraction", "data"), "offset points", **style)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], -1.3 * size))
