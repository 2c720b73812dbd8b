"""The page of result files and columns, from the schemas that the files themselves carry.

python -m docs.tools.columns        # writes docs/columns.md
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from hooked_moe.analysis import expert_tokens
from hooked_moe.circuits.tracing import findings, published
from hooked_moe.circuits.tracing import tables as tracing
from hooked_moe.report.derived_files import DERIVED_FILES, DerivedFile
from hooked_moe.routing.route_table import ROUTES
from hooked_moe.tables import schemas

PAGE = Path(__file__).resolve().parents[1] / "columns.md"
MEASURED = {
    "effects.parquet": ("one removal of one expert at one token", schemas.EFFECTS),
    "tokens.parquet": ("one token", schemas.TOKENS),
    "token_texts.parquet": ("one token, as text", schemas.TOKEN_TEXTS),
    "documents.parquet": ("one document", schemas.DOCUMENTS),
    "routing.parquet": ("one expert of one layer in one document", schemas.ROUTING),
    "expert_weights.parquet": ("one expert of one layer", schemas.EXPERT_WEIGHTS),
    "effects_sequence.parquet": ("one removal from the whole sequence, read at one token", schemas.EFFECTS_SEQUENCE),
    "progressive.parquet": ("one number of experts removed at one token, in one order", schemas.PROGRESSIVE),
}
OF_EXPERTS = {
    "expert_tokens.parquet": ("one of the largest removals of an expert", expert_tokens.EXPERT_TOKENS),
    "token_shares.parquet": ("one of the tokens there", expert_tokens.TOKEN_SHARES),
}
OF_OTHER_COMMANDS = {
    "grafts.csv": ("one graft, of `hooked-moe study grafts`", schemas.GRAFTS),
    "shapley_layers.csv, shapley_parts.csv": ("one layer; one part; of `hooked-moe study grafts`", schemas.COALITION_SHARES),
    "checkpoints.csv": ("one response of one checkpoint, of `hooked-moe study checkpoints`", schemas.CHECKPOINTS),
    "cases.parquet": ("one fact, of `hooked-moe trace`", tracing.CASES),
    "findings.csv": ("one finding, of `hooked-moe trace`", findings.FINDINGS),
    "published.csv": ("one number beside the published one, of `hooked-moe trace --protocol as_published`", published.COMPARISON),
    "routing tables": ("one expert slot of one token, of `hooked_moe.routing.routing_table`", ROUTES),
}


def page() -> str:
    parts = [
        "# Every column",
        "Parquet files carry this page in their schemas: "
        '`pyarrow.parquet.read_schema(path).field("gap_norm").metadata` is a column\'s meaning and unit. '
        "What the files are, and how they come about, is on [the page of results](results.md).",
        "## Measured",
        *(section(name, about, schema) for name, (about, schema) in MEASURED.items()),
        "## Of experts, in words",
        *(section(name, about, schema) for name, (about, schema) in OF_EXPERTS.items()),
        "## Of other commands",
        *(section(name, about, schema) for name, (about, schema) in OF_OTHER_COMMANDS.items()),
        "## Derived",
        "Each says its inputs in `analysis.json`. These are the columns that the report reads; `_low` and `_high` are the "
        "ends of 95% intervals.",
        *(derived(name, file) for name, file in DERIVED_FILES.items()),
    ]
    return "\n\n".join(parts) + "\n"


def derived(name: str, file: DerivedFile) -> str:
    about = f"{file.about[0].upper()}{file.about[1:]}. Made by `{file.command.replace(' --model {model}', '')}`."
    return f"### `{name}`\n\n{about}\n\n" + ", ".join(f"`{column}`" for column in file.columns)


def section(name: str, about: str, schema: pa.Schema) -> str:
    rows = [f"### `{name}`", "", f"A row is {about}.", "", "| column | unit | meaning |", "|---|---|---|"]
    for field in schema:
        words = {key.decode(): value.decode().replace("|", "\\|") for key, value in field.metadata.items()}
        rows.append(f"| `{field.name}` | {words['unit']} | {words['meaning']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
