"""The tables that a run leaves behind: what measurement writes and analysis reads, and all that passes between the two."""

from hooked_moe.tables.files import (
    atomic_path,
    read_csv,
    remove_temporaries,
    required_file,
    write_csv_atomic,
    write_json_atomic,
    write_parquet_atomic,
    write_text_atomic,
)
from hooked_moe.tables.grid_result import Axis, Column, GridResult
from hooked_moe.tables.result import Result
from hooked_moe.tables.schemas import (
    COMPARISONS,
    DOCUMENTS,
    EFFECTS,
    EFFECTS_SEQUENCE,
    EXPERT_WEIGHTS,
    PROGRESSIVE,
    RELEASED_EXPERTS,
    RELEASED_PROGRESSIVE,
    RELEASED_REDISTRIBUTION,
    REMOVAL_ORDERS,
    ROUTING,
    TOKENS,
    schema_of,
    table_with_schema,
)

__all__ = [
    "COMPARISONS",
    "DOCUMENTS",
    "EFFECTS",
    "EFFECTS_SEQUENCE",
    "EXPERT_WEIGHTS",
    "PROGRESSIVE",
    "RELEASED_EXPERTS",
    "RELEASED_PROGRESSIVE",
    "RELEASED_REDISTRIBUTION",
    "REMOVAL_ORDERS",
    "ROUTING",
    "TOKENS",
    "Axis",
    "Column",
    "GridResult",
    "Result",
    "atomic_path",
    "read_csv",
    "remove_temporaries",
    "required_file",
    "schema_of",
    "table_with_schema",
    "write_csv_atomic",
    "write_json_atomic",
    "write_parquet_atomic",
    "write_text_atomic",
]
