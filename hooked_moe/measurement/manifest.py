"""manifest.json of a run: its plan, which parts have been measured, what verification found, and the checksums of the tables.

It is written last, in one step, so what it says was so. Read back, it must have its checksum, and be of the plan beside it and of
the types that are written here; anything else is refused with the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hooked_moe.checks import quoted
from hooked_moe.tables import file_fault, file_records, is_record, read_checked_json, set_aside, write_checked_json

MANIFEST = "manifest.json"
_REMEDY = "remove it, and the same command measures again what it lists"


class Manifest:
    """The manifest of a run, and the files that it lists."""

    def __init__(self, directory: Path, plan: dict[str, Any], part_fault: Callable[[str, Any], str | None]) -> None:
        """As it was written; new where it was not. `part_fault` says what is wrong with the record of a part, None for nothing.

        Raises `ValueError` for a manifest of another plan, and for one that is none.
        """
        self.directory = directory
        self.values: dict[str, Any] = plan | {"parts": {}, "files": {}}
        path = directory / MANIFEST
        if not path.exists():
            return
        written = read_checked_json(path, _REMEDY)
        other = sorted(key for key in plan if written.get(key) != plan[key])
        if other:
            raise ValueError(f"{path} is of another {' and '.join(other)} than this run: {_REMEDY}")
        fault = _shape_fault(written, part_fault)
        if fault is not None:
            raise ValueError(f"{path}: {fault}; {_REMEDY}")
        self.values = written

    @property
    def parts(self) -> dict[str, Any]:
        return self.values["parts"]

    def fault(self, name: str) -> str | None:
        """What is wrong with a table of the run; None if it is as it was written."""
        record = self.values["files"].get(name)
        return "was not written by this run" if record is None else file_fault(self.directory / name, record)

    def damaged_files(self, tables: Mapping[str, Iterable[str]], log: Callable[[str], object], leave: bool = False) -> set[str]:
        """The listed files that are missing or damaged; these are set aside, and the log is told, unless they are to be left.

        Not so those of a part that was being measured again: then its shards are there, and its `tables` may be of either
        measurement.
        """
        shards = self.directory / "shards"
        unfinished = {name for part, names in tables.items() if any(shards.glob(f"{part}-*/*.json")) for name in names}
        damaged = set()
        for name in self.values["files"]:
            fault = self.fault(name)
            if fault is None:
                continue
            damaged.add(name)
            if name not in unfinished and not leave:
                aside = set_aside(self.directory / name)
                where = "" if aside is None else f"; set aside as {aside.name}"
                log(f"note: {self.directory / name} {fault}{where}; it is made again when it is asked for")
        return damaged

    def write(self, names: Iterable[str]) -> None:
        """Record the named files as they are now, and write the manifest."""
        self.values["files"] |= file_records(self.directory, names)
        write_checked_json(self.values, self.directory / MANIFEST)


def _shape_fault(values: dict[str, Any], part_fault: Callable[[str, Any], str | None]) -> str | None:
    """Where a manifest is not of the types that it is written with."""
    parts, files = values.get("parts"), values.get("files")
    if not isinstance(parts, dict) or not isinstance(files, dict):
        return "it lacks the objects 'parts' and 'files'"
    for name, record in files.items():
        if not is_record(record):
            return f"'files' has no size and checksum for {quoted(name)}"
    for part, record in parts.items():
        fault = part_fault(part, record)
        if fault is not None:
            return f"part {quoted(part)} {fault}"
    checks, floor = values.get("verification", []), values.get("noise_floor", {"max_abs_nats": 0})
    if not isinstance(checks, list) or not all(
        isinstance(check, dict) and isinstance(check.get("name"), str) for check in checks
    ):
        return "'verification' is no list of named checks"
    if not isinstance(values.get("computed_on", {}), dict):
        return "'computed_on' is no object"
    if not isinstance(floor, dict) or not isinstance(floor.get("max_abs_nats"), int | float):
        return "'noise_floor' has no number max_abs_nats"
    budget = values.get("budget", {"share": 1.0})
    if not isinstance(budget, dict) or not isinstance(budget.get("share"), float) or not 0 < budget["share"] <= 1:
        return "'budget' has no share of the removals"
    return None
