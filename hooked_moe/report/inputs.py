"""What the report reads of a run: its derived tables and its manifest.

Every file is optional. A table that is absent was not measured, and its section says how to measure it; a table that lacks a
column was written by another version, and is refused by name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.report.derived_files import DERIVED_FILES, SAMPLE_FILES
from hooked_moe.tables import FileRecord, Ledger, read_checked_json, read_csv, read_parquet

EXPLORER_PAGES = ("documents.html", "experts.html")


@dataclass(frozen=True)
class Inputs:
    """The tables that a run has, by file name; its manifest, empty where there is none; why other tables are absent; and the
    explorer pages beside the report."""

    tables: dict[str, pa.Table]
    manifest: dict[str, Any]
    reasons: dict[str, str]
    explorer: tuple[str, ...] = ()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table; an empty list where the table is absent."""
        return self.tables[name].to_pylist() if name in self.tables else []

    def command(self, name: str) -> str:
        """The command line that measures an absent table."""
        return DERIVED_FILES[name].command.format(model=self.value("model", "name") or "MODEL")

    def value(self, *keys: str) -> Any:
        """The value that the manifest has under nested keys; None where it lacks one of them."""
        node: Any = self.manifest
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def model_name(self) -> str:
        return str(self.value("model", "name") or "unnamed model")

    @property
    def n_layers(self) -> int:
        """Number of layers of the model by the manifest; without a manifest, up to the last layer measured."""
        n_layers = self.value("model", "config", "n_layers")
        if isinstance(n_layers, int):
            return n_layers
        measured = [
            layer
            for table in self.tables.values()
            if "layer" in table.column_names
            for layer in table["layer"].to_pylist()
            if isinstance(layer, int)
        ]
        return max(measured, default=0) + 1

    @property
    def noise_floor(self) -> float | None:
        """Largest loss change, in nats, of a removal that removes nothing; None where it was not measured or is 0."""
        value = self.value("noise_floor", "max_abs_nats")
        return float(value) if isinstance(value, int | float) and value > 0 else None


def read_inputs(run: Path) -> Inputs:
    """Read the derived tables that a run has, and its manifest.

    A table that was made of other files than there are now, or that is damaged, is left out, with the reason. Raises
    FileNotFoundError where the run has no derived table at all, ValueError where a table lacks columns.
    """
    tables = {}
    reasons = left_out(run)
    for name, file in (DERIVED_FILES | SAMPLE_FILES).items():
        path = run / name
        if name in reasons or not path.is_file():
            continue
        table = read_parquet(path) if path.suffix == ".parquet" else _typed(read_csv(path))
        missing = [column for column in file.columns if column not in table.column_names]
        if missing:
            raise ValueError(f"{path} lacks column {', '.join(missing)}; analyse the run again with this version")
        tables[name] = table
    if not tables:
        why = next((f" ({name}: {reasons[name]})" for name in DERIVED_FILES if name in reasons), "")
        raise FileNotFoundError(
            f"{os.fspath(run)} has none of the derived tables {', '.join(DERIVED_FILES)}{why}; analyse the run first"
        )
    manifest = run / "manifest.json"
    return Inputs(tables, read_checked_json(manifest) if manifest.is_file() else {}, reasons, explorer_pages(run))


def explorer_pages(run: Path) -> tuple[str, ...]:
    """The explorer pages that a run has."""
    return tuple(name for name in EXPLORER_PAGES if (run / name).is_file())


def left_out(run: Path, known: Mapping[str, FileRecord | None] | None = None) -> dict[str, str]:
    """Why tables are not in the report: not measured, or not what they say they are. `known` is as in `tables.Ledger`."""
    ledger = Ledger(run, known)
    return ledger.not_measured | ledger.unrecorded(DERIVED_FILES | SAMPLE_FILES) | ledger.faults()


_COUNTS = {"layer", "slot", "expert", "removed", "n"}


def _typed(table: pa.Table) -> pa.Table:
    """The table of a csv file with the types it was written with: csv cannot tell 1.0 from 1, nor empty texts from nulls."""
    fields = []
    for field in table.schema:
        counts = field.name in _COUNTS or field.name.startswith("n_")
        if pa.types.is_integer(field.type) and not counts:
            field = field.with_type(pa.float64())
        elif pa.types.is_null(field.type):
            field = field.with_type(pa.string())
        fields.append(field)
    table = table.cast(pa.schema(fields))
    for index, field in enumerate(fields):
        if pa.types.is_string(field.type):
            table = table.set_column(index, field, table.column(index).fill_null(""))
    return table
