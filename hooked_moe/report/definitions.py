"""What the columns of a run's files mean: from the schemas that the files are written with."""

from hooked_moe import tables
from hooked_moe.analysis.budgeted import BUDGETED
from hooked_moe.analysis.cells import cells_table
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.expert_tokens import EXPERT_TOKENS, TOKEN_SHARES
from hooked_moe.analysis.summaries import LAYER_COLUMNS
from hooked_moe.report.blocks import Folded, Section, Table, table_row

_SCHEMAS = {
    "cells.csv": cells_table([]).schema,
    "effects.parquet": tables.EFFECTS,
    "estimates.parquet": tables.ESTIMATES,
    "sampled_effects.parquet": tables.SAMPLED_EFFECTS,
    "draw.parquet": tables.DRAW,
    "budgeted.csv": BUDGETED,
    "effects_sequence.parquet": tables.EFFECTS_SEQUENCE,
    "progressive.parquet": tables.PROGRESSIVE,
    "routing.parquet": tables.ROUTING,
    "expert_weights.parquet": tables.EXPERT_WEIGHTS,
    "tokens.parquet": tables.TOKENS,
    "token_texts.parquet": tables.TOKEN_TEXTS,
    "documents.parquet": tables.DOCUMENTS,
    "expert_tokens.parquet": EXPERT_TOKENS,
    "token_shares.parquet": TOKEN_SHARES,
}


def definitions() -> Section:
    """A folded table for each file."""
    columns = {
        name: [(field.name, field.metadata[b"unit"].decode(), field.metadata[b"meaning"].decode()) for field in schema]
        for name, schema in _SCHEMAS.items()
    }
    columns["layers.csv"] = [(name, unit, meaning) for name, (unit, meaning) in LAYER_COLUMNS.items()]
    columns["experts.parquet"] = [
        (criterion.name, criterion.unit, f"{criterion.formula} ({criterion.source})") for criterion in CRITERIA.values()
    ]
    tables_by_file = {
        name: Table(("column", "unit", "meaning"), tuple(table_row(*row) for row in rows), "words")
        for name, rows in columns.items()
    }
    folded = tuple(Folded(name, (table,), on_paper=False) for name, table in tables_by_file.items())
    return Section("columns", "What the columns mean", folded)
