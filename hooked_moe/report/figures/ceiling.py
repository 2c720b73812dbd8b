"""The static ceiling: what any fixed ranking of experts could explain, and the share of it that each criterion reaches."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from hooked_moe.report.figures.drawing import (
    BLACK,
    BLUE,
    LEGEND_BELOW,
    NARROW,
    SKY,
    SMALL,
    WIDE,
    Drawing,
    distinct,
    layer_axis,
    rows_where,
    zero_line,
)
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.number_text import MINUS

_COLOURS = {"oracle": BLACK, "paper": BLUE, "extended": SKY}
_CLIP = (-0.5, 1.5)  # shares beyond are noise over a small ceiling; bars are cut there and say so


def pooled_shares(ceiling: pa.Table) -> dict[str, tuple[str, float]]:
    """The family of each criterion, and its share of the static ceiling with layers pooled.

    Sums are divided by sums, so that a layer with a small ceiling has little weight. NaN where the ceiling is not above 0.
    """
    shares = {}
    for criterion in distinct(ceiling, "criterion"):
        rows = rows_where(ceiling, criterion=criterion)
        explained, possible = rows["share_of_variance"].astype(float), rows["ceiling"].astype(float)
        known = np.isfinite(explained) & np.isfinite(possible)
        total = possible[known].sum()
        shares[criterion] = (str(rows["family"][0]), float(explained[known].sum() / total) if total > 0 else float("nan"))
    return shares


def static_ceiling(ceiling: pa.Table, of_kl: bool = False) -> Drawing:
    """The ceiling of realised effects, or `of_kl`: that of the logarithm of expected ones."""
    shares = pooled_shares(ceiling)
    pooled = pa.array([shares[criterion][1] for criterion in ceiling.column("criterion").to_pylist()])
    effect = "the logarithm of expected effects (KL)" if of_kl else "realised effects"
    return Drawing(
        "ceiling_kl" if of_kl else "ceiling",
        f"How much of the variance of {effect} lies between experts?",
        f"First panel: the static ceiling, which is the share of the variance of {effect} within a position that lies between "
        "experts, cross-fitted over documents (bars: one standard error); no fixed ranking can explain more of it. "
        "Second panel: the share of that ceiling which each criterion reaches when it is used linearly, layers pooled; dots are "
        "single layers whose ceiling exceeds two standard errors. The oracle ranks experts by their mean effect in other "
        "documents.",
        ceiling.append_column("share_of_ceiling_pooled", pooled),
        draw_static_ceiling,
    )


def draw_static_ceiling(numbers: pa.Table, narrow: bool) -> Figure:
    criteria = _ordered(numbers)
    height = 0.9 + 0.19 * len(criteria)
    if narrow:
        figure = Figure(figsize=(NARROW, height + 3.3), layout=ConstrainedLayoutEngine(h_pad=0.1))
        parts: Any = figure.subfigures(2, 1, height_ratios=[2.4, height + 0.9])  # apart, so that labels do not align
        lower = parts[1]
        ceiling, reached = parts[0].subplots(), lower.subplots()
    else:
        figure = lower = Figure(figsize=(WIDE, max(height, 3.0)), layout=ConstrainedLayoutEngine(w_pad=0.08))
        ceiling, reached = figure.subplots(1, 2, width_ratios=[1, 1.5])

    first = rows_where(numbers, criterion=distinct(numbers, "criterion")[0])
    ceiling.bar(first["layer"], first["ceiling"].astype(float), color="#9a9a9a", zorder=2, width=0.7)
    ceiling.errorbar(
        first["layer"],
        first["ceiling"].astype(float),
        first["ceiling_se"].astype(float),
        fmt="none",
        ecolor="#222222",
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
    zero_line(ceiling)
    layer_axis(ceiling, np.unique(first["layer"]))
    ceiling.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%".replace("-", MINUS))
    ceiling.set(ylabel="share of variance", title="static ceiling")

    for at, criterion in enumerate(criteria):
        rows = rows_where(numbers, criterion=criterion)
        family, pooled = rows["family"][0], float(rows["share_of_ceiling_pooled"][0])
        reached.barh(at, np.clip(pooled, *_CLIP), color=_COLOURS[family], alpha=0.85, height=0.66, zorder=2)
        trusted = rows["ceiling"].astype(float) > 2 * rows["ceiling_se"].astype(float)
        dots = np.clip(rows["share_of_ceiling"].astype(float)[trusted], *_CLIP)
        reached.plot(dots, np.full(len(dots), at), ".", color="#222222", markersize=4, markeredgewidth=0, alpha=0.7, zorder=4)
    reached.set_yticks(range(len(criteria)), [label(criterion) for criterion in criteria], fontsize=SMALL)
    reached.invert_yaxis()
    reached.axvline(0, color="#222222", linewidth=0.8, zorder=3)
    reached.axvline(1, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    low, high = reached.get_xlim()
    reached.set(xlim=(max(low, _CLIP[0]), min(max(high, 1.05), _CLIP[1])), xlabel="share of the static ceiling")
    reached.set_title("what each criterion reaches", x=-0.5 if narrow else 0)
    reached.xaxis.set_major_formatter(PercentFormatter(1))
    families = [family for family in _COLOURS if family in numbers.column("family").to_pylist()]
    handles = [Patch(color=_COLOURS[family], alpha=0.85) for family in families]
    lower.legend(handles, [FAMILY_TITLES[family] for family in families], ncols=1 if narrow else 3, **LEGEND_BELOW)
    return figure


def _ordered(numbers: pa.Table) -> list[str]:
    """The oracle first, then criteria by falling share; those without one last."""
    shares = pooled_shares(numbers)

    def key(criterion: str) -> tuple[bool, bool, float]:
        family, share = shares[criterion]
        return family != "oracle", math.isnan(share), -share

    return sorted(shares, key=key)
