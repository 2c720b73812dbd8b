"""JSON files in which a run says something of itself (manifest.json, plan.json, analysis.json): they carry their own checksum.

Tables have theirs in the manifest and in analysis.json; what these two say would otherwise be believed by itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from hooked_moe.tables.files import write_json_atomic
from hooked_moe.tables.reading import read_json

CHECKSUM = "checksum"
"""The key of the checksum: `digest` of the rest of the object."""


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object; the order of its keys does not matter.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_checked_json(value: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write an object together with its checksum."""
    value = json.loads(json.dumps(value))  # as it is read back: the keys are text, and sorted as such
    write_json_atomic({**value, CHECKSUM: digest(value)}, path)


def read_checked_json(
    path: str | os.PathLike[str], remedy: str = "remove it, and the command that wrote it makes it again"
) -> dict[str, Any]:
    """The object that `write_checked_json` wrote, without the checksum.

    Raises `ValueError`, which ends with the remedy, for anything else: even one number that was changed since.
    """
    value = read_json(path, remedy)
    written = value.pop(CHECKSUM, None)
    if written is None:
        raise ValueError(f"{os.fspath(path)} has no checksum: an earlier version or another program wrote it; {remedy}")
    if written != digest(value):
        raise ValueError(f"{os.fspath(path)} was changed since it was written: its checksum is of other contents; {remedy}")
    return value
