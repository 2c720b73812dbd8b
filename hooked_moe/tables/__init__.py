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
    ROUTING,
    TOKENS,
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
    "ROUTING",
    "TOKENS",
    "atomic_path",
    "read_csv",
    "remove_temporaries",
    "required_file",
    "write_csv_atomic",
    "write_json_atomic",
    "write_parquet_atomic",
    "write_text_atomic",
]
