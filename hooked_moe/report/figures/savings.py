"""What each criterion saves, with intervals: realised and expected loss beside each other."""

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from hooked_moe.report.figures.drawing import BLUE, NARROW, SMALL, VERMILLION, WIDE, Drawing, distinct, rows_where
from hooked_moe.report.figures.names import FIXED_FAMILIES, label

_KEPT = (
    *("effect", "family", "ranking", "saving_share", "saving_share_low", "saving_share_high", "saving", "saving_low"),
    *("saving_high", "random_cost", "p_family", "outcome"),
)
_EFFECTS = {"delta_loss": (BLUE, "o", -0.17, "realised loss"), "kl": (VERMILLION, "s", 0.17, "expected loss (KL)")}
_CLIP = (-1.05, 1.1)  # shares beyond are drawn at the edge


def savings(table: pa.Table, margin: float) -> Drawing:
    """The savings of all rankings over all layers together; `margin` is the share within which a saving is negligible."""
    total = pa.array([layer == "all" for layer in table.column("layer").to_pylist()])
    numbers = table.filter(total).select(_KEPT)
    numbers = numbers.append_column("margin", pa.array(np.full(numbers.num_rows, margin)))
    return Drawing(
        "savings",
        "What does one save by removing the expert that a criterion would prune first?",
        "Removing an active expert at random sets the scale: 0% is no better than that, 100% is a removal that costs nothing. "
        f"Bars are 95% intervals over documents. {_effects_in_words(numbers)} Savings inside the grey band, {margin:.0%} of the "
        "random cost, are negligible. Below the line are rankings for comparison that one cannot prune by: per-token scores, "
        "which differ from token to token, and the oracle, which knows the effects of other documents." + _edge_in_words(numbers),
        numbers,
        draw_savings,
    )


def _effects_in_words(numbers: pa.Table) -> str:
    realised = "the change in the loss of the token that followed"
    if "kl" not in distinct(numbers, "effect"):
        return f"The effect is {realised}."
    return f"Circles: {realised}; squares: its expectation under the model, the KL divergence."


def _edge_in_words(numbers: pa.Table) -> str:
    shares = np.array(numbers.column("saving_share").to_pylist(), float)
    beyond = (shares < _CLIP[0]) | (shares > _CLIP[1])
    names = dict.fromkeys(label(name) for name, cut in zip(numbers.column("ranking").to_pylist(), beyond, strict=True) if cut)
    return f" Beyond the edge, where a mark is drawn in their place: {', '.join(names)}." if names else ""


def draw_savings(numbers: pa.Table, narrow: bool) -> Figure:
    fixed, others = _ordered(numbers)
    rankings = [*fixed, *others]
    size = (NARROW, 1.5 + 0.21 * len(rankings)) if narrow else (WIDE, 1.1 + 0.19 * len(rankings))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))
    axes = figure.subplots()
    margin = float(numbers.column("margin")[0].as_py())
    axes.axvspan(-margin, margin, color="#e4e4e4", linewidth=0, zorder=0)
    axes.axvline(0, color="#222222", linewidth=0.8, zorder=1)
    if others:
        axes.axhline(len(fixed) - 0.5, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    heights = {ranking: at for at, ranking in enumerate(rankings)}
    for effect, (colour, marker, shift, text) in _EFFECTS.items():
        rows = rows_where(numbers, effect=effect)
        if not len(rows["ranking"]):
            continue  # this effect was not measured
        middle, low, high = (
            np.clip(rows[name].astype(float), *_CLIP) for name in ("saving_share", "saving_share_low", "saving_share_high")
        )
        y = np.array([heights[ranking] for ranking in rows["ranking"]]) + shift
        axes.errorbar(
            middle,
            y,
            xerr=[middle - low, high - middle],
            fmt=marker,
            color=colour,
            markersize=3.4 if narrow else 4.2,
            elinewidth=1.4,
            capsize=0,
            label=text,
            zorder=3,
        )
    axes.set_yticks(range(len(rankings)), [label(ranking) for ranking in rankings], fontsize=SMALL + 0.5)
    axes.set_ylim(len(rankings) - 0.4, -0.6)
    axes.set_xlim(_limits(numbers))
    figure.supxlabel("saved, share of the random cost", fontsize=SMALL + 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    figure.legend(ncols=2, loc="outside upper center", handlelength=2.4, columnspacing=1.6)
    return figure


def _limits(numbers: pa.Table) -> tuple[float, float]:
    ends = np.array([numbers.column(f"saving_share_{end}").to_pylist() for end in ("low", "high")], float)
    low, high = np.nanmin(ends, initial=0.0), np.nanmax(ends, initial=1.0)
    return max(float(low) - 0.05, _CLIP[0]), min(float(high) + 0.05, _CLIP[1])


def _ordered(numbers: pa.Table) -> tuple[list[str], list[str]]:
    """The fixed criteria and the other rankings, each by falling saving of the realised loss."""
    rows = [row for row in numbers.to_pylist() if row["effect"] == "delta_loss"]
    rows.sort(key=lambda row: -np.inf if np.isnan(row["saving_share"]) else row["saving_share"], reverse=True)
    fixed = [row["ranking"] for row in rows if row["family"] in FIXED_FAMILIES]
    return fixed, [row["ranking"] for row in rows if row["family"] not in FIXED_FAMILIES]
