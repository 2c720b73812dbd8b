"""What the report is made of: the derived tables of a run and its manifest, and which command writes each.

Every file is optional. What is absent was not measured, and its section says how to measure it; a file that is there but
lacks a column was written by another version, and is refused by name.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hooked_moe.tables import read_csv


@dataclass(frozen=True)
class Source:
    """A derived file: what it answers, the columns that the report reads, and the command that measures it."""

    about: str
    columns: tuple[str, ...]
    command: str


def _interval(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


_AUDIT = "hooked-moe audit --model {model}"

SOURCES = {
    "cells.csv": Source(
        "whether each ranking of experts points at the one whose removal costs more",
        (
            *("scope", "population", "family", "ranking", "layer", "n", "n_positions", "n_undefined", "n_tests", "alpha"),
            *_interval("d_position", "spearman"),
            *("mean_high", "mean_low", "mean_difference", "t", "p_t", "p_wilcoxon", "p_t_bonferroni", "p_wilcoxon_bonferroni"),
            *("p_t_holm", "p_t_bh", "p_max_t", "p_tost", "equivalence_bound", "verdict"),
            *("power_at_d02", "minimal_detectable_d"),
            *("bf10", "bf_directional", "note"),
        ),
        _AUDIT,
    ),
    "layers.csv": Source(
        "how large the effect of one removal is",
        ("layer", "slot", "n_removals", "mean_delta", "mean_abs_delta", "share_positive", "mean_gap_norm"),
        _AUDIT,
    ),
    "slots.csv": Source(
        "how the effect falls with the expert's rank by routing weight",
        ("layer", "slot", "n_removals", *_interval("mean_delta")),
        _AUDIT,
    ),
    "slot_distribution.csv": Source("how the effects of a rank are distributed", ("slot", "statistic", "level", "nats"), _AUDIT),
    "experts.parquet": Source("the mean effect of every expert", ("layer", "expert", "n_removals", "mean_delta"), _AUDIT),
    "domains.csv": Source("how the effect differs between kinds of text", ("domain",), _AUDIT),
    "ceiling.csv": Source(
        "how much any fixed ranking of experts could explain",
        ("layer", "family", "criterion", "share_of_variance", "se", "share_of_ceiling", "ceiling", "ceiling_se"),
        _AUDIT,
    ),
    "bayes.csv": Source(
        "which criterion best predicts the order of effects in documents left out",
        (
            *("family", "criterion", "pl_beta", "pl_sd", "pl_log_bf10", "lodo_score", "stacking_weight", "note"),
            *("n_positions_used", "n_positions_available"),
        ),
        _AUDIT,
    ),
    "scopes.csv": Source(
        "what changes when the expert is removed from the whole sequence",
        ("layer", "mean_abs_position", "mean_abs_sequence", "mean_abs_gap", "correlation", "same_sign"),
        f"{_AUDIT} --scope both",
    ),
    "progressive.csv": Source(
        "what removing several experts at one token does",
        ("layer", "order", "removed", "n_positions", *_interval("mean", "median", "p95")),
        "hooked-moe progressive --model {model}",
    ),
    "redistribution.csv": Source(
        "whether the remaining experts make up for the removed one",
        (
            *("layer", "n_experts", "mean_gap_norm", "mean_compensation"),
            *_interval("rho_weight_gap", "rho_weight_norm", "rho_gap_compensation", "rho_gap_alignment"),
        ),
        "hooked-moe redistribution --model {model}",
    ),
}


@dataclass(frozen=True)
class Inputs:
    """The tables of a run that are there, by file name, its manifest (empty where there is none), and why others are absent."""

    tables: dict[str, pa.Table]
    manifest: dict[str, Any]
    reasons: dict[str, str]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table; none where it is absent."""
        return self.tables[name].to_pylist() if name in self.tables else []

    def command(self, name: str) -> str:
        """The command line that measures an absent table."""
        return SOURCES[name].command.format(model=self.value("model", "name") or "MODEL")

    def value(self, *keys: str) -> Any:
        """What the manifest has under nested keys; None where it lacks one."""
        node: Any = self.manifest
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def model_name(self) -> str:
        return str(self.value("model", "name") or "unnamed model")

    @property
    def n_layers(self) -> int:
        """Layers of the model, as the manifest says; without one, up to the last that was measured."""
        known = self.value("model", "config", "n_layers")
        if isinstance(known, int):
            return known
        measured = [
            layer for table in self.tables.values() if "layer" in table.column_names for layer in table["layer"].to_pylist()
        ]
        return max(measured, default=0) + 1

    @property
    def noise_floor(self) -> float | None:
        """Largest loss change of a removal that removes nothing, in nats; None where it was not measured or is 0."""
        value = self.value("noise_floor", "max_abs_nats")
        return float(value) if isinstance(value, int | float) and value > 0 else None


def read_inputs(run: Path) -> Inputs:
    """Read what is there of a run.

    Raises FileNotFoundError where there is no derived table at all, ValueError where one lacks columns.
    """
    tables = {}
    for name, source in SOURCES.items():
        path = run / name
        if not path.is_file():
            continue
        table = pq.read_table(path, use_threads=False) if path.suffix == ".parquet" else _typed(read_csv(path))
        missing = [column for column in source.columns if column not in table.column_names]
        if missing:
            raise ValueError(f"{path} lacks column {', '.join(missing)}; analyse the run again with this version")
        tables[name] = table
    if not tables:
        raise FileNotFoundError(f"{os.fspath(run)} has none of the derived tables {', '.join(SOURCES)}; analyse the run first")
    return Inputs(tables, _read_json(run / "manifest.json"), _read_json(run / "analysis.json").get("not_measured", {}))


_COUNTS = {"layer", "slot", "expert", "removed", "n"}


def _typed(table: pa.Table) -> pa.Table:
    """The table of a csv file with the types that were written: csv has no word for 1.0, nor for a column of empty texts."""
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


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
