"""What the columns of a run's files mean: from the schemas that the files are written with."""

import html

from hooked_moe import tables
from hooked_moe.analysis.cells import cells_table
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.summaries import LAYER_COLUMNS
from hooked_moe.report.page import folded, html_row, html_table


def definitions() -> str:
    """A folded table for each file."""
    files = {
        name: [(field.name, field.metadata[b"unit"].decode(), field.metadata[b"meaning"].decode()) for field in schema]
        for name, schema in {
            "cells.csv": cells_table([]).schema,
            "effects.parquet": tables.EFFECTS,
            "effects_sequence.parquet": tables.EFFECTS_SEQUENCE,
            "progressive.parquet": tables.PROGRESSIVE,
            "routing.parquet": tables.ROUTING,
            "expert_weights.parquet": tables.EXPERT_WEIGHTS,
            "tokens.parquet": tables.TOKENS,
            "documents.parquet": tables.DOCUMENTS,
        }.items()
    }
    files["layers.csv"] = [(name, unit, meaning) for name, (unit, meaning) in LAYER_COLUMNS.items()]
    files["experts.parquet"] = [
        (criterion.name, criterion.unit, f"{criterion.formula} ({criterion.source})") for criterion in CRITERIA.values()
    ]
    return "".join(
        folded(
            name,
            html_table(("column", "unit", "meaning"), [html_row(map(html.escape, row)) for row in rows], "words"),
            on_paper=False,
        )
        for name, rows in files.items()
    )
