"""What tracing found: its tables, and the questions that they answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from hooked_moe.circuits.tracing.patches import SITES
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.circuits.tracing.selection import Candidate, Estimate, ExpertGrid, candidates, estimate, halves
from hooked_moe.tables.checked_json import read_checked_json, write_checked_json
from hooked_moe.tables.checksums import FileRecords, file_fault, file_record
from hooked_moe.tables.files import atomic_path
from hooked_moe.tables.result import Result

TABLES = ("cases", "blocks", "experts")
METADATA = "tracing.json"


@dataclass(frozen=True, repr=False)
class TracingResult(Result):
    """`cases`, `blocks` and `experts` are pyarrow tables whose fields say what they mean; see `docs/tracing.md`.

    What is chosen is chosen on the discovery half of the cases, and every number of `summary` is of the other half.
    """

    cases: pa.Table
    blocks: pa.Table
    experts: pa.Table
    identity: Mapping[str, Any]
    """What the result is of: the model, the protocol, the number of layers and experts, and why records were left out."""

    @property
    def protocol(self) -> Protocol:
        return Protocol(**self.identity["protocol"])

    @cached_property
    def discovery(self) -> Bool[np.ndarray, " case"]:
        """Which cases the expert is chosen on."""
        return halves(self.cases.num_rows, self.protocol.seed)

    @cached_property
    def grid(self) -> ExpertGrid:
        """The rescue of every expert that is active in the clean run."""
        shape = (self.cases.num_rows, self.identity["n_layers"], self.identity["n_experts"])
        rescue, weight, active = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
        columns = {name: self.experts[name].to_numpy() for name in ("case", "layer", "expert", "rescue", "weight_clean")}
        clean = self.experts["clean_active"].to_numpy(zero_copy_only=False)
        place = tuple(columns[axis][clean] for axis in ("case", "layer", "expert"))
        rescue[place], weight[place], active[place] = columns["rescue"][clean], columns["weight_clean"][clean], True
        return ExpertGrid(rescue, active, weight)

    def site(self, site: str, column: str = "rescue") -> Float[np.ndarray, "case layer"]:
        """What a patch of one site did in every case and layer; of "all_moe", [case, 1]. Raises `ValueError` for other names."""
        if site not in (*SITES, "all_moe"):
            raise ValueError(f"site must be one of {', '.join(map(repr, (*SITES, 'all_moe')))}, not {site!r}")
        chosen = self.blocks["site"].to_numpy(zero_copy_only=False) == site
        values: np.ndarray = self.blocks[column].to_numpy()[chosen]
        return values.reshape(self.cases.num_rows, -1)  # rows are sorted by case, then by layer

    @cached_property
    def ranking(self) -> list[Candidate]:
        """Experts active often enough in the discovery cases, the one that rescues most first."""
        protocol = self.protocol
        return candidates(self.grid, self.site("moe_out"), self.discovery, protocol.search, protocol.recurrence)

    @property
    def selection(self) -> Candidate | None:
        """The expert that was chosen; None where none is active often enough."""
        return self.ranking[0] if self.ranking else None

    @property
    def layer(self) -> int:
        """The layer whose MLP output, patched, rescues most over the discovery cases."""
        return int(self.site("moe_out")[self.discovery].mean(0).argmax())

    def expert(self, layer: int, expert: int, column: str = "rescue") -> Float[np.ndarray, " case"]:
        """A column of `experts` for one expert in every case; 0 where the clean run does not go to it."""
        own = (self.experts["layer"].to_numpy() == layer) & (self.experts["expert"].to_numpy() == expert)
        own &= self.experts["clean_active"].to_numpy(zero_copy_only=False)
        values = np.zeros(self.cases.num_rows)
        values[self.experts["case"].to_numpy()[own]] = self.experts[column].to_numpy()[own]
        return values

    def specificity(self, layer: int, expert: int) -> Float[np.ndarray, " case"]:
        """The expert's rescue minus the mean of the other experts active in its layer, in every case."""
        return self.grid.specificity(layer, expert, self.protocol.others, self.protocol.seed)

    def validated(self, values: Float[np.ndarray, " case"]) -> Estimate:
        """The mean over the validation cases where there is a value, with its interval and p."""
        values = np.asarray(values)[~self.discovery]
        return estimate(values[np.isfinite(values)], self.protocol.seed)

    def table(self) -> pa.Table:
        """`experts`: one row per case, layer and expert."""
        return self.experts

    def metadata(self) -> dict[str, Any]:
        return dict(self.identity)

    def summary(self) -> str:
        drop = self.cases["drop"].to_numpy().mean()
        chosen = self.selection
        found = "no expert recurs" if chosen is None else f"L{chosen.layer}E{chosen.expert} chosen"
        return f"{self.cases.num_rows} cases of {self.identity['model']}, mean drop {drop:.2f} logits, {found}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tables and what they are of into a directory."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        records: FileRecords = {}
        for name in TABLES:
            with atomic_path(directory / f"{name}.parquet") as temporary:
                pq.write_table(getattr(self, name), temporary, compression="zstd")
            records[name] = file_record(directory / f"{name}.parquet")
        write_checked_json({"kind": "TracingResult", "files": records, **self.identity}, directory / METADATA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TracingResult:
        """The result that `save` wrote. Raises FileNotFoundError for missing files, ValueError for others than its own."""
        directory = Path(path)
        for name in (*(f"{name}.parquet" for name in TABLES), METADATA):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} does not exist; expected a directory that TracingResult.save wrote")
        identity = read_checked_json(directory / METADATA, "trace again")
        if identity.pop("kind", None) != "TracingResult":
            raise ValueError(f"{directory / METADATA} is not of a TracingResult; expected what TracingResult.save wrote")
        records = identity.pop("files", {})
        for name in TABLES:
            file = directory / f"{name}.parquet"
            if fault := file_fault(file, records.get(name)):
                raise ValueError(f"{file} is damaged, or of another result: it {fault}; trace again")
        return cls(**{name: pq.read_table(directory / f"{name}.parquet") for name in TABLES}, identity=identity)
