"""The first picture of the page: what the expert that each criterion would prune first costs, beside one at random."""

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from hooked_moe.report.figures.drawing import BLUE, GREY, NARROW, SMALL, VERMILLION, WIDE, Drawing, distinct
from hooked_moe.report.figures.names import FIXED_FAMILIES, label

_KEPT = ("family", "ranking", "saving_share", "saving_share_low", "saving_share_high", "outcome")
_COLOURS = {"helps": BLUE, "harms": VERMILLION, "negligible": GREY, "undecided": "#c9c9c9"}
_WORDS = {"helps": "shown to help", "harms": "shown to harm", "negligible": "negligible", "undecided": "undecided"}
_MOST = 3.0  # costs beyond are drawn at the edge


def verdict(savings: pa.Table) -> Drawing:
    """Fixed criteria over all layers together, by the realised loss, the cheapest first; those without a number are left out."""
    rows = [
        row
        for row in savings.select(("effect", "layer", *_KEPT)).to_pylist()
        if (row["effect"], row["layer"]) == ("delta_loss", "all")
        and row["family"] in FIXED_FAMILIES
        and not np.isnan(row["saving_share"])
    ]
    rows.sort(key=lambda row: -row["saving_share"])
    columns = {
        "ranking": [row["ranking"] for row in rows],
        "cost_share": [1 - row["saving_share"] for row in rows],
        "cost_share_low": [1 - row["saving_share_high"] for row in rows],
        "cost_share_high": [1 - row["saving_share_low"] for row in rows],
        "outcome": [row["outcome"] for row in rows],
    }
    return Drawing(
        "verdict",
        "What it costs to remove the expert that a criterion would prune first",
        "Share of what removing an active expert at random costs, the mean over all tokens and layers, with 95% intervals over "
        "documents: the shorter the bar, the better the criterion knows which experts are not needed.",
        pa.table(columns),
        draw_verdict,
    )


def draw_verdict(numbers: pa.Table, narrow: bool) -> Figure:
    rows = numbers.num_rows
    size = (NARROW, 0.95 + 0.165 * rows) if narrow else (0.85 * WIDE, 0.95 + 0.175 * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.05))
    axes = figure.subplots()
    middle, low, high = (
        np.clip(np.array(numbers.column(f"cost_share{end}").to_pylist(), float), -0.5, _MOST) for end in ("", "_low", "_high")
    )
    outcomes = numbers.column("outcome").to_pylist()
    y = np.arange(rows)
    axes.barh(y, middle, color=[_COLOURS.get(outcome, "#e4e4e4") for outcome in outcomes], height=0.68, zorder=2)
    known = ~np.isnan(low)
    ends = np.stack([middle - low, high - middle])[:, known]
    axes.errorbar(middle[known], y[known], xerr=ends, fmt="none", ecolor="#222222", elinewidth=1.1, zorder=3)
    axes.axvline(1, color="#222222", linewidth=0.9, linestyle=(0, (4, 3)), zorder=4)
    axes.annotate("at random", (1, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", fontsize=SMALL)
    names = [label(ranking) for ranking in numbers.column("ranking").to_pylist()]
    axes.set_yticks(y, names, fontsize=SMALL + 0.5)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(min(0.0, float(np.nanmin(low, initial=0.0))), max(1.12, float(np.nanmax(high, initial=1.0)) * 1.03))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("cost, % of one at random")
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    shown = [outcome for outcome in _COLOURS if outcome in distinct(numbers, "outcome")]
    patches = [Patch(color=_COLOURS[outcome], label=_WORDS[outcome]) for outcome in shown]
    figure.legend(handles=patches, ncols=2 if narrow else 4, loc="outside lower center", handlelength=1.2, columnspacing=1.4)
    return figure
