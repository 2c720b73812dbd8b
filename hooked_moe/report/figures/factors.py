"""Effects of training choices on what an audit finds, a panel for each response."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hooked_moe.report.figures.drawing import BLUE, GREY, NARROW, VERMILLION, WIDE, Drawing, distinct, rows_where

_COLOURS = {"effect": VERMILLION, "negligible": BLUE, "undecided": GREY}
_NAMES = ("response", "title", "factor", "label", "effect", "low", "high", "negligible_within", "outcome", "detectable")


def factor_effects(effects: pa.Table, titles: dict[str, str]) -> Drawing:
    """The primary responses' effects."""
    return Drawing(
        "factor_effects",
        "What each training choice changes",
        f"{_what(effects)} Red: different from 0 after Holm's correction over the seven factors. Blue: negligible, the whole "
        f"interval inside the grey band. Grey: undecided. {_DETECTABLE}",
        _numbers(effects, titles),
        draw_factor_effects,
    )


def described_effects(effects: pa.Table, titles: dict[str, str]) -> Drawing:
    """The same of all runs, also of those that do not count: no colour says what may be concluded, for nothing may."""
    return Drawing(
        "factor_effects_all_runs",
        "What each training choice goes with in all runs, outside the rule",
        f"A description. {_what(effects)} Runs whose experts are worth too little to count are among them. {_DETECTABLE}",
        _numbers(effects, titles).drop_columns(["negligible_within", "outcome"]),
        draw_factor_effects,
    )


_DETECTABLE = "The dotted lines are the effects that this many runs would find with 80% chance."


def _what(effects: pa.Table) -> str:
    n_runs, n_seeds = (effects[name][0].as_py() for name in ("n_runs", "n_seeds"))
    return f"High level less low level, with 95% intervals; {n_runs} runs of {n_seeds} seed{'s' if n_seeds > 1 else ''}."


def _numbers(effects: pa.Table, titles: dict[str, str]) -> pa.Table:
    rows = [row | {"title": titles[row["response"]]} for row in effects.to_pylist() if row["primary"]]
    return pa.Table.from_pylist([{name: row[name] for name in _NAMES} for row in rows])


def draw_factor_effects(numbers: pa.Table, narrow: bool) -> Figure:
    responses = distinct(numbers, "response")
    columns = 1 if narrow else 2
    rows = -(-len(responses) // columns)
    figure = Figure(figsize=(NARROW if narrow else WIDE, 1.75 * rows), layout=ConstrainedLayoutEngine(h_pad=0.06))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, response in zip(panels, responses, strict=False):
        _draw_panel(axes, rows_where(numbers, response=response))
    for axes in panels[len(responses) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, rows: dict[str, np.ndarray]) -> None:
    detectable, outcomes = float(rows["detectable"][0]), rows.get("outcome", ["undecided"] * len(rows["effect"]))
    if "negligible_within" in rows:
        bound = float(rows["negligible_within"][0])
        axes.axvspan(-bound, bound, color="#e8e8e8", linewidth=0, zorder=0)
    axes.axvline(0, color="#222222", linewidth=0.8, zorder=1)
    for end in (-detectable, detectable):
        axes.axvline(end, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    for y, (middle, low, high, outcome) in enumerate(zip(rows["effect"], rows["low"], rows["high"], outcomes, strict=True)):
        colour = _COLOURS[str(outcome)]
        axes.plot([float(low), float(high)], [y, y], color=colour, linewidth=1.4)
        axes.plot(float(middle), y, "o", color=colour, markersize=4.5)
    axes.set(yticks=range(len(rows["factor"])), title=str(rows["title"][0]))
    axes.set_yticklabels(list(rows["label"]), fontsize=8)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
