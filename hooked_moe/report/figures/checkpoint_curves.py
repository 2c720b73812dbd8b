"""An audit's numbers by training step, a panel for each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hooked_moe.report.figures.drawing import (
    BLUE,
    LEGEND_BELOW,
    NARROW,
    VERMILLION,
    WIDE,
    Drawing,
    line_with_band,
    rows_where,
    zero_line,
)

PANELS = {
    "held_out_loss": "held-out loss (nats)",
    "routed_part": "a layer without its experts (nats)",
    "mean_kl": "mean KL of a removal (nats)",
    "d_control": "d of the routing weight",
    "saving_reap_kl": "saving of REAP, expected effect",
    "spearman_reap_kl": "rank correlation REAP, KL",
    "best_paper_spearman": "best rank correlation, loss",
    "log_kl_ceiling": "log KL's variance between experts",
}
_FROM_ZERO = (
    "routed_part",
    "mean_kl",
    "d_control",
    "saving_reap_kl",
    "spearman_reap_kl",
    "best_paper_spearman",
    "log_kl_ceiling",
)


def checkpoint_curves(responses: pa.Table) -> Drawing:
    """All layers together, and the last one alone."""
    last = str(max(int(layer) for layer in set(responses["layer"].to_pylist()) if layer != "all"))
    rows = [row for row in responses.to_pylist() if row["name"] in PANELS and row["layer"] in ("all", last)]
    for row in rows:
        row["where"] = "all layers" if row["layer"] == "all" else "last layer"
    return Drawing(
        "checkpoints",
        "How an audit's numbers grow with training",
        "Every point is an audit of one checkpoint, in order. Blue: all layers. Red: the last. Bands are 95% intervals over "
        "documents, of that checkpoint: they do not say how much another training would differ.",
        pa.Table.from_pylist(rows),
        draw_checkpoint_curves,
    )


def draw_checkpoint_curves(numbers: pa.Table, narrow: bool) -> Figure:
    present = [name for name in PANELS if name in set(numbers["name"].to_pylist())]
    columns = 1 if narrow else 2
    rows = -(-len(present) // columns)
    figure = Figure(figsize=(NARROW if narrow else WIDE, 1.7 * rows + 0.3), layout=ConstrainedLayoutEngine(h_pad=0.06))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, present, strict=False):
        _draw_panel(axes, numbers, name)
    for axes in panels[len(present) :]:
        axes.set_visible(False)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), ncols=2, **LEGEND_BELOW)
    return figure


def _draw_panel(axes: Axes, numbers: pa.Table, name: str) -> None:
    positions = sorted(set(numbers["step"].to_pylist()))
    for where, colour, marker in (("last layer", VERMILLION, "s"), ("all layers", BLUE, "o")):
        rows = rows_where(numbers, name=name, where=where)
        if len(rows["step"]):
            x = np.array([positions.index(step) for step in rows["step"]])
            values = [rows[column].astype(float) for column in ("value", "low", "high")]
            line_with_band(axes, x, *values, colour=colour, marker=marker, label=where)
    if name in _FROM_ZERO:
        zero_line(axes)
    axes.set(title=PANELS[name], xticks=range(len(positions)), xlabel="training step")
    axes.set_xticklabels([f"{step:,}" for step in positions], fontsize=8, rotation=30 if len(positions) > 6 else 0)
