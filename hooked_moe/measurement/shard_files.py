"""The shards of a measurement: what was measured of each document (or text, or pruning), kept as it is measured.

A unit's tables are parquet files UNIT.TABLE.parquet, and UNIT.json is their record: the identity of the measurement, and the
checksum of every file. It is written last, so a unit that has one is whole. What is read back is compared with it to the bit; a
unit that is damaged, or of another measurement, is set aside (NAME.damaged), named in the log, and measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.tables import (
    file_fault,
    file_record,
    read_checked_json,
    read_parquet,
    set_aside,
    write_checked_json,
    write_parquet_atomic,
)


class ShardFiles:
    """The shards of one measurement in one directory."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], names: Iterable[str], log: Callable[[str], object]) -> None:
        """`identity` says in JSON values what is measured, and `names` the tables of a unit."""
        self.directory = directory
        self.names = tuple(names)
        self.identity = dict(identity)
        self._log = log

    def is_whole(self, unit: str) -> bool:
        """Whether a unit's tables are there as they were written. Damaged files are set aside, and the log says so."""
        record = self._record_path(unit)
        if not record.is_file():
            return False  # not measured, or not to its end
        fault = self._record_fault(unit)
        damaged = [record, *(self._path(unit, name) for name in self.names)]
        if fault is None:
            faults = self._table_faults(unit)
            fault, damaged = "; ".join(f"{path.name} {text}" for path, text in faults.items()), list(faults)
        if not fault:
            return True
        aside = [path.name for path in damaged if set_aside(path)]
        where = f"; {', '.join(aside)} set aside as *.damaged" if aside else ""
        self._log(f"note: {self.directory}: {fault}{where}; measured again")
        record.unlink(missing_ok=True)
        return False

    def write(self, unit: str, tables: Mapping[str, pa.Table], **notes: str) -> None:
        """Keep a unit's tables; the identity goes into the metadata of each, and the notes into the unit's record."""
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {name: str(value) for name, value in self.identity.items()} | {"unit": unit}
        for name, table in tables.items():
            write_parquet_atomic(table.replace_schema_metadata(metadata), self._path(unit, name))
        files = {name: file_record(self._path(unit, name)) for name in tables}
        write_checked_json(notes | {"identity": self.identity, "unit": unit, "files": files}, self._record_path(unit))

    def names_of(self, unit: str) -> list[str]:
        """A unit's files, the record last."""
        return [path.name for path in (*(self._path(unit, name) for name in self.names), self._record_path(unit))]

    def has_record(self, unit: str) -> bool:
        """Whether a unit has been written, damaged or not."""
        return self._record_path(unit).is_file()

    def note(self, unit: str, name: str) -> str:
        """A note of a unit's record; empty where it has none of that name."""
        return str(read_checked_json(self._record_path(unit)).get(name, ""))

    def read(self, unit: str, name: str) -> pa.Table:
        """A table of a unit, without the metadata of its shard."""
        return read_parquet(self._path(unit, name)).replace_schema_metadata(None)

    def _record_fault(self, unit: str) -> str | None:
        """What is wrong with the record of a unit; None if it is of this measurement."""
        path = self._record_path(unit)
        try:
            record = read_checked_json(path)
        except ValueError:
            return f"{path.name} is not as it was written"
        if (record.get("identity"), record.get("unit")) != (self.identity, unit):
            return f"{path.name} is of another measurement ({record.get('identity')!s:.200}, unit {record.get('unit')!r:.50})"
        files = record.get("files")
        whole = isinstance(files, dict) and sorted(files) == sorted(self.names)
        return None if whole else f"{path.name} does not list {', '.join(self.names)}"

    def _table_faults(self, unit: str) -> dict[Path, str]:
        """What is wrong with the tables of a unit, against its record."""
        files = read_checked_json(self._record_path(unit))["files"]
        faults = {self._path(unit, name): file_fault(self._path(unit, name), files[name]) for name in self.names}
        return {path: fault for path, fault in faults.items() if fault is not None}

    def _path(self, unit: str, name: str) -> Path:
        return self.directory / f"{unit}.{name}.parquet"

    def _record_path(self, unit: str) -> Path:
        return self.directory / f"{unit}.json"


def remove_shards(directory: Path) -> None:
    """Delete a directory of shards, but for those that were set aside."""
    for path in sorted(directory.glob("*")):
        if path.suffix in (".parquet", ".json", ".lock"):
            path.unlink()
    _remove_if_empty(directory)


def remove_shards_of_part(shards: Path, part: str) -> None:
    """The same for what the directory of a run's shards has of a part."""
    for directory in sorted(shards.glob(f"{part}-*")):
        remove_shards(directory)
    for lock in shards.glob("share-*.lock"):
        lock.unlink()
    _remove_if_empty(shards)


def _remove_if_empty(directory: Path) -> None:
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()
