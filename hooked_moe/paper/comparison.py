"""A model's runs beside the published tables: ours, published, difference.

This module reads what the experiments leave in their directories, and measures nothing. Where the model is the published one,
layers are the published layers; any other model of the family is put beside them by relative depth, which compares shapes, not
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.paper.published import CONTROL_RANKING, PublishedModel, PublishedValue, published_model, published_values
from hooked_moe.tables import Ledger, read_checked_json, read_csv

Key = tuple[str, int, int, str]
"""(ranking, removed, layer, statistic), as in `PublishedValue`."""
EXPERIMENTS = {
    "Table 1": "audit",
    "Table 2": "audit",
    "Table 3": "audit",
    "Table 4": "control",
    "Table 5": "control",
    "Table 6": "control",
    "Table 7": "redistribution",
    "Table 8": "progressive",
    "Table 9": "progressive",
    "Figure 2": "redistribution",
}


TABLES = ("cells.csv", "control.csv", "redistribution.csv", "progressive.csv")
"""The derived tables of a run that have numbers with a published counterpart."""


@dataclass(frozen=True)
class RunValues:
    """The numbers of one run that have a published counterpart."""

    protocol: str
    """defined or as_released."""
    directory: Path
    model_type: str
    n_layers: int
    values: dict[Key, float]
    left_out: dict[str, str]
    """Why a table of the run was not read: it was made of other files than there are now, or is damaged."""

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, _, layer, _ in self.values})


@dataclass(frozen=True)
class ComparedValue:
    """A published number and ours; NaN where none of the runs has it."""

    published: PublishedValue
    layer: int | None
    """Our layer; None where no layer was measured."""
    ours: float

    @property
    def difference(self) -> float:
        return self.ours - self.published.value


def read_run(directory: Path) -> RunValues:
    """The comparable numbers of a run's derived tables. Raises `ValueError` for a directory that is not a run's."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not the directory of a run: it has no manifest.json")
    manifest = read_checked_json(path)
    model_type, n_layers = (_value(manifest, "model", "config", key) for key in ("model_type", "n_layers"))
    if not isinstance(model_type, str) or not isinstance(n_layers, int) or n_layers < 1:
        raise ValueError(
            f"{path} does not say in model.config which model_type it is of, and of how many n_layers: it is no run's manifest; "
            "remove it, and measure the run again"
        )
    released = _value(manifest, "protocol", "name") == "as_released"
    tables = _Tables(directory)
    values = dict((_released_values if released else _defined_values)(tables))
    protocol = "as_released" if released else "defined"
    return RunValues(protocol, directory, model_type, n_layers, values, tables.left_out)


def _value(node: Any, *keys: str) -> Any:
    """A value under nested keys of a JSON object; None where it lacks one of them."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def compare(run: RunValues) -> list[ComparedValue]:
    """Every published number of the family's model beside the run's. Empty for a family that the paper did not audit."""
    published = published_model(run.model_type)
    if published is None:
        return []
    compared = []
    for value in published_values():
        if value.model != published.name:
            continue
        quantity = (value.ranking, value.removed, value.statistic)
        layers = sorted({layer for ranking, removed, layer, statistic in run.values if (ranking, removed, statistic) == quantity})
        layer = counterpart(value.layer, published, layers, run.n_layers)
        ours = float("nan") if layer is None else run.values[value.ranking, value.removed, layer, value.statistic]
        compared.append(ComparedValue(value, layer, ours))
    return compared


def counterpart(layer: int, published: PublishedModel, measured: list[int], n_layers: int) -> int | None:
    """Which measured layer stands beside a published one: itself in the published model, else the nearest in relative depth."""
    if n_layers == published.n_layers:
        return layer if layer in measured else None
    if not measured:
        return None
    depth = layer / (published.n_layers - 1)
    return min(measured, key=lambda own: (abs(own / max(n_layers - 1, 1) - depth), own))  # one layer alone has depth 0


def comparison_table(run: RunValues, compared: list[ComparedValue]) -> pa.Table:
    """One row per published number."""
    rows = [
        {
            "table": value.published.table,
            "experiment": EXPERIMENTS[value.published.table],
            "protocol": run.protocol,
            "ranking": value.published.ranking,
            "removed": value.published.removed,
            "published_layer": value.published.layer,
            "layer": value.layer,
            "statistic": value.published.statistic,
            "ours": value.ours,
            "published": value.published.value,
            "difference": value.difference,
        }
        for value in compared
    ]
    return pa.Table.from_pylist(rows)


# --- what runs leave behind --------------------------------------------------------------------------------------------


class _Tables:
    """The derived tables of a run, but for those that its ledger knows to be of other files, or damaged."""

    def __init__(self, directory: Path) -> None:
        self.left_out = {name: fault for name, fault in Ledger(directory).faults().items() if name in TABLES}
        self._directory = directory

    def rows(self, name: str, *columns: str) -> list[dict[str, Any]]:
        """The rows of a table; none where it was not written, because that experiment has not been run."""
        path = self._directory / name
        if name in self.left_out or not path.is_file():
            return []
        table = read_csv(path)
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise ValueError(f"{path} lacks column {', '.join(missing)}; run the experiment again with this version")
        return table.to_pylist()


def _defined_values(tables: _Tables) -> Iterator[tuple[Key, float]]:
    """The numbers of a defined run. Its sample is the paper's kind of population: as many positions, each a pair."""
    for row in tables.rows("cells.csv", "scope", "population", "ranking", "layer", "d_z", "p_t", "p_wilcoxon"):
        if (row["scope"], row["population"]) == ("position", "sample"):
            for statistic, column in (("d", "d_z"), ("p_t", "p_t"), ("p_wilcoxon", "p_wilcoxon")):
                yield (row["ranking"], 1, row["layer"], statistic), _number(row[column])
    for row in tables.rows("control.csv", "ranking", "population", "layer", "rho_weight_ratio"):
        if (row["ranking"], row["population"]) == (CONTROL_RANKING, "sample"):
            yield (CONTROL_RANKING, 1, row["layer"], "rho"), _number(row["rho_weight_ratio"])
    yield from _shared_values(tables)


def _released_values(tables: _Tables) -> Iterator[tuple[Key, float]]:
    statistics = ("d", "p_t", "p_wilcoxon", "rho")
    for row in tables.rows("cells.csv", "ranking", "layer", *statistics):
        for statistic in statistics:
            yield (row["ranking"], 1, row["layer"], statistic), _number(row[statistic])
    yield from _shared_values(tables)


def _shared_values(tables: _Tables) -> Iterator[tuple[Key, float]]:
    statistics = ("mean_gap_norm", "rho_weight_gap", "rho_gap_compensation")
    for row in tables.rows("redistribution.csv", "layer", *statistics):
        if row.get("pairing", "as_released") == "as_released":
            for statistic in statistics:
                yield ("", 0, row["layer"], statistic), _number(row[statistic])
    quantiles = ("mean", "median", "p95")
    for row in tables.rows("progressive.csv", "layer", "order", "removed", *quantiles):
        for statistic in quantiles:
            yield (row["order"], row["removed"], row["layer"], statistic), _number(row[statistic])


def _number(value: Any) -> float:
    return float(np.nan if value is None or value == "" else value)
