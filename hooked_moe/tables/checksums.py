"""What a file of a run was when it was written: its size and SHA-256, by which damage, loss and exchange are known.

Times of modification say nothing of the kind: a clock can go back, and copies have the time of the copying.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

FileRecord: TypeAlias = dict[str, Any]
"""{"bytes": size, "sha256": hexadecimal digest}, as JSON keeps it."""
FileRecords: TypeAlias = dict[str, FileRecord | None]
"""By the file's name in the directory of its run; None for a file that is not there."""


def file_record(path: str | os.PathLike[str]) -> FileRecord | None:
    """Size and SHA-256 of a file; None where there is none.

    >>> file_record("no/such/file") is None
    True
    """
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_records(directory: Path, names: Iterable[str]) -> FileRecords:
    """The record of every named file of a directory."""
    return {name: file_record(directory / name) for name in names}


def file_fault(path: Path, record: Any) -> str | None:
    """In words what is wrong with a file that was written with this record; None where it is the same to the bit."""
    if not path.is_file():
        return "is missing"
    if not is_record(record):
        return "has no readable checksum"
    size = path.stat().st_size
    if size != record["bytes"]:  # without reading it
        return f"has {size:,} bytes, and {record['bytes']:,} were written"
    return None if file_record(path) == record else "does not have the checksum that it was written with"


def is_record(value: Any) -> bool:
    """Whether a JSON value is a file's record."""
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file to NAME.damaged, over an earlier one; returns that path, None where there is no file."""
    if not path.is_file():
        return None
    damaged = path.with_name(f"{path.name}.damaged")
    os.replace(path, damaged)
    return damaged
