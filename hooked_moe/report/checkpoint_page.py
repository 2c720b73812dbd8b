"""The page of a study of checkpoints: report.html beside checkpoints.csv."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from hooked_moe.report.blocks import Lead, Page, Paragraph, Section, Table, table_row
from hooked_moe.report.figures.checkpoint_curves import PANELS, checkpoint_curves
from hooked_moe.report.number_text import interval, signed
from hooked_moe.report.page import render_page
from hooked_moe.report.sections import figure
from hooked_moe.tables import CHECKPOINTS, read_csv, required_file, write_text_atomic

_NOTE = (
    "Intervals are over documents: they belong to the checkpoint that they stand by. One training was followed, so that nothing "
    "here says how much another seed would differ; the factor study asks that."
)


def write_checkpoint_report(directory: Path) -> Path:
    """Write report.html and figures/ from checkpoints.csv; returns the page's path. Raises FileNotFoundError without it."""
    path = required_file(directory, "checkpoints.csv", "hooked-moe study checkpoints writes it")
    responses = read_csv(path, CHECKPOINTS)
    (directory / "figures").mkdir(exist_ok=True)
    drawing = checkpoint_curves(responses)
    page = Page(
        "An audit's numbers by training step",
        (_lead(responses), Paragraph(_NOTE)),
        (
            Section("curves", "Curves", (figure(1, drawing, drawing.save(directory / "figures")),)),
            Section("numbers", "Every checkpoint", (_table(responses),)),
        ),
    )
    write_text_atomic(render_page(page), directory / "report.html")
    return directory / "report.html"


def _lead(responses: pa.Table) -> Lead:
    rows = [row for row in responses.to_pylist() if row["layer"] == "all"]
    steps = sorted({row["step"] for row in rows})
    ends = [{row["name"]: row["value"] for row in rows if row["step"] == step} for step in (steps[0], steps[-1])]
    changes = (
        f"{PANELS[name]} {ends[0][name]:.3f} to {ends[1][name]:.3f}" for name in PANELS if name in ends[0] and name in ends[1]
    )
    return Lead(f"{len(steps)} checkpoints, from step {steps[0]:,} to {steps[-1]:,}.", f"First to last: {'; '.join(changes)}.")


def _table(responses: pa.Table) -> Table:
    rows = [row for row in responses.to_pylist() if row["layer"] == "all" and row["name"] in PANELS]
    checkpoints = list(dict.fromkeys((row["step"], row["checkpoint"]) for row in rows))
    body = []
    for step, label in checkpoints:
        own = {row["name"]: row for row in rows if row["checkpoint"] == label}
        cells = (f"{signed(own[n]['value'], 3)} {interval(own[n]['low'], own[n]['high'], 3)}" if n in own else "" for n in PANELS)
        body.append(table_row(f"{step:,}", label, *cells))
    return Table(("step", "checkpoint", *PANELS.values()), tuple(body), "words")
