"""analysis.json: of what every derived file of a run was made, by checksums, so that none is taken for what it is not.

A derivation has a name ("analysis", "report", "pruning"), inputs, settings, and outputs. It is recorded once its outputs are
written: whoever is killed before leaves a record of earlier files, or none, and the derivation is made again. It holds as long as
inputs, settings, the package's version and outputs are those recorded; `fault` says in words why it does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.tables.checked_json import read_checked_json, write_checked_json
from hooked_moe.tables.checksums import FileRecord, FileRecords, file_fault, file_record
from hooked_moe.tables.files import write_csv_atomic
from hooked_moe.tables.reading import required_file
from hooked_moe.version import __version__

LEDGER = "analysis.json"
NOT_MADE = "it has not been made"


class Ledger:
    """The derivations of a run."""

    def __init__(self, run: Path, known: Mapping[str, FileRecord | None] | None = None) -> None:
        """`known` are records of files that need not be read again, for they have just been compared with their checksums.

        A ledger that cannot be read, or was changed, counts as none: all that it could say is made again.
        """
        self.run = run
        self.not_measured: dict[str, str] = {}
        """What the analysis could not derive, and why."""
        self._known: FileRecords = dict(known or {})
        self._derivations: dict[str, dict[str, Any]] = {}
        self._absent = NOT_MADE
        if not (run / LEDGER).is_file():
            return
        try:
            written = read_checked_json(run / LEDGER)
        except ValueError:
            self._absent = f"{LEDGER} is damaged"
            return
        self.not_measured = _text_by_name(written.get("not_measured"))
        entries = written.get("derivations")
        if isinstance(entries, dict):
            self._derivations = {name: entry for name, entry in entries.items() if _is_entry(entry)}

    def __contains__(self, derivation: str) -> bool:
        return derivation in self._derivations

    def outputs(self, derivation: str) -> list[str]:
        """The files that a derivation has written; none if it was not made."""
        return sorted(self._derivations.get(derivation, {"outputs": {}})["outputs"])

    def settings(self, derivation: str) -> dict[str, Any]:
        """What beside its inputs decided a derivation; nothing if it was not made."""
        return dict(self._derivations.get(derivation, {"settings": {}}).get("settings", {}))

    def fault(self, derivation: str, inputs: Iterable[str], settings: Mapping[str, Any]) -> str | None:
        """Why the outputs are not what the derivation would write now; None where they are."""
        if derivation not in self._derivations:
            return self._absent
        entry = self._derivations[derivation]
        if sorted(entry["inputs"]) != sorted(inputs):
            return "it was made of other files"
        if entry["settings"] != _as_json(settings):
            return "it was made with other settings"
        return self._fault(entry) or next((fault for fault in self._damage(entry).values()), None)

    def faults(self) -> dict[str, str]:
        """Every derived file that is not what it says it is, by name, with the reason and the command that makes it again."""
        found: dict[str, str] = {}
        for entry in self._derivations.values():
            found |= self._faults_of(entry)
        return found

    def fault_of(self, name: str) -> str | None:
        """Why one derived file is not what it says it is, as in `faults` and `unrecorded`; None where it is."""
        for entry in self._derivations.values():
            if name in entry["outputs"]:
                return self._faults_of(entry).get(name)
        return self.unrecorded([name]).get(name)

    def unrecorded(self, names: Iterable[str]) -> dict[str, str]:
        """Files of an analysed run of which the ledger does not say what they were made of, by name, with the reason."""
        if "analysis" not in self and self._absent == NOT_MADE:
            return {}
        recorded = {name for entry in self._derivations.values() for name in entry["outputs"]}
        there = {name for name in names if (self.run / name).is_file()}
        reason = f"{LEDGER} does not say of what it was made" if self._absent == NOT_MADE else self._absent
        return dict.fromkeys(sorted(there - recorded), reason)

    def record(
        self,
        derivation: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        *,
        settings: Mapping[str, Any] | None = None,
        command: str = "",
        not_measured: Mapping[str, str] | None = None,
    ) -> None:
        """Write down a derivation whose outputs have been written, and delete files that it wrote before and does not write now.

        `command` is the line that makes it again. `not_measured` replaces what the analysis says of that.
        """
        written = set(outputs)
        for name in set(self.outputs(derivation)) - written:
            (self.run / name).unlink(missing_ok=True)
        for entry in self._derivations.values():  # a file is of the derivation that wrote it last
            entry["outputs"] = {name: record for name, record in entry["outputs"].items() if name not in written}
        self._derivations[derivation] = {
            "version": __version__,
            "inputs": {name: file_record(self.run / name) for name in inputs},
            "settings": _as_json(settings or {}),
            "outputs": {name: file_record(self.run / name) for name in written},
            "command": command,
        }
        self._derivations = {name: entry for name, entry in self._derivations.items() if entry["outputs"]}
        if not_measured is not None:
            self.not_measured = dict(not_measured)
        write_checked_json({"derivations": self._derivations, "not_measured": self.not_measured}, self.run / LEDGER)

    def _fault(self, entry: dict[str, Any]) -> str | None:
        """What has changed since of all that the outputs were made from."""
        if entry["version"] != __version__:
            return f"made by hooked_moe {entry['version']}, and this is {__version__}"
        changed = [name for name, record in entry["inputs"].items() if self._record(name) != record]
        return f"made of another {' and '.join(changed)} than there is now" if changed else None

    def _faults_of(self, entry: dict[str, Any]) -> dict[str, str]:
        """The outputs that are stale or damaged, with the reason and the command that makes them again."""
        stale = self._fault(entry)
        damaged = self._damage(entry) if stale is None else dict.fromkeys(entry["outputs"], stale)
        again = f"; `{entry['command']}` makes it again" if entry.get("command") else ""
        return {name: f"{fault}{again}" for name, fault in damaged.items()}

    def _damage(self, entry: dict[str, Any]) -> dict[str, str]:
        """The outputs that are not as they were written."""
        faults = {name: file_fault(self.run / name, record) for name, record in entry["outputs"].items()}
        return {name: f"{name} {fault}" for name, fault in faults.items() if fault is not None}

    def _record(self, name: str) -> FileRecord | None:
        if name not in self._known:
            self._known[name] = file_record(self.run / name)
        return self._known[name]


def current_file(run: Path, name: str, origin: str) -> Path:
    """The path of a derived file that may be read.

    Raises FileNotFoundError, which says where the file comes from, if it is missing, and ValueError if it is damaged, or was made
    of other files than the run has now.
    """
    path = required_file(run, name, origin)
    fault = Ledger(run).fault_of(name)
    if fault is not None:
        raise ValueError(f"{path} is not what the run would give now: {fault}")
    return path


def write_derived(run: Path, derivation: str, tables: Mapping[str, pa.Table], inputs: Iterable[str], command: str) -> None:
    """Write csv tables that were made of the inputs, and record that; `command` makes them again."""
    for name, table in tables.items():
        write_csv_atomic(table, run / name)
    Ledger(run).record(derivation, inputs, tables, command=command)


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back: tuples become lists."""
    return dict(json.loads(json.dumps(value)))


def _text_by_name(value: Any) -> dict[str, str]:
    return {name: str(text) for name, text in value.items()} if isinstance(value, dict) else {}


def _is_entry(entry: Any) -> bool:
    kinds = {"version": str, "inputs": dict, "settings": dict, "outputs": dict}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
