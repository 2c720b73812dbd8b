"""What tracing found: its tables, and the questions that they answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from hooked_moe.circuits.tracing.patches import SITES
from hooked_moe.circuits.tracing.places import PLACES
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.circuits.tracing.selection import Candidate, Estimate, ExpertGrid, best_first, candidates, estimate
from hooked_moe.tables.checked_json import read_checked_json, write_checked_json
from hooked_moe.tables.checksums import FileRecords, file_fault, file_record
from hooked_moe.tables.files import atomic_path, write_parquet
from hooked_moe.tables.result import Result

TABLES = ("cases", "blocks", "experts")
METADATA = "tracing.json"


class EqualNorm(NamedTuple):
    """Rescue in logits."""

    own: Float[np.ndarray, " case"]
    matched: Float[np.ndarray, " case"]


@dataclass(frozen=True, repr=False)
class TracingResult(Result):
    """`cases`, `blocks` and `experts` are pyarrow tables whose fields say what they mean; see `docs/tracing.md`.

    What is chosen is chosen on the discovery half of the cases, and tested on the other. Where several tokens of a prompt were
    patched, `at(place)` is the result of those at one place, and the expert that is chosen is the best of all places.
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
        return np.array(self.cases["split"].to_pylist()) == "discovery"

    @cached_property
    def places(self) -> list[str]:
        """What the patched tokens are in their prompts, in the order of `places.PLACES`."""
        found = set(self.blocks["place"].unique().to_pylist())
        return [place for place in PLACES if place in found]

    def at(self, place: str) -> TracingResult:
        """The same of the tokens at one place: of the cases that have one there. Raises `ValueError` for other places."""
        if place not in self.places:
            raise ValueError(f"patched were {', '.join(map(repr, self.places))}, not {place!r}")
        if len(self.places) == 1:
            return self
        blocks, experts = (table.filter(pc.equal(table["place"], place)) for table in (self.blocks, self.experts))
        cases = self.cases.filter(pc.is_in(self.cases["case"], blocks["case"].unique()))
        return replace(self, cases=cases, blocks=blocks, experts=experts)

    @cached_property
    def grid(self) -> ExpertGrid:
        """The rescue of every expert that is active in the clean run, at the one place; a mean over the case's tokens there."""
        shape = (self.cases.num_rows, self.identity["n_layers"], self.identity["n_experts"])
        clean = self.experts.filter(self.experts["clean_active"])
        place = (self._case_rows(clean), clean["layer"].to_numpy(), clean["expert"].to_numpy())
        rescue, weight = (self._per_case(shape, place, clean[name].to_numpy()) for name in ("rescue", "weight_clean"))
        active = np.zeros(shape, dtype=bool)
        active[place] = True
        return ExpertGrid(rescue, active, weight)

    def _case_rows(self, table: pa.Table) -> Int[np.ndarray, " row"]:
        """The row of `cases` of each row of another table."""
        rows: np.ndarray = np.searchsorted(self.cases["case"].to_numpy(), table["case"].to_numpy())
        return rows

    def _per_case(
        self, shape: tuple[int, ...], place: tuple[np.ndarray, ...], values: Float[np.ndarray, " row"]
    ) -> Float[np.ndarray, "case *rest"]:
        """Means over the tokens that are patched in each case, a token without a value counting as zero."""
        if len(self.places) > 1:
            raise ValueError(f"several tokens of a prompt were patched: choose with .at(place), of {', '.join(self.places)}")
        sums = np.zeros(shape)
        np.add.at(sums, place, values)
        ceilings = self.blocks.filter(pc.equal(self.blocks["site"], "all_moe"))
        tokens = np.bincount(self._case_rows(ceilings), minlength=shape[0])
        result: np.ndarray = sums / tokens.reshape(-1, *[1] * (len(shape) - 1))
        return result

    def site(self, site: str, column: str = "rescue") -> Float[np.ndarray, "case layer"]:
        """What a patch of one site did in every case and layer; of "all_moe", [case, 1]. Raises `ValueError` for other names."""
        if site not in (*SITES, "all_moe"):
            raise ValueError(f"site must be one of {', '.join(map(repr, (*SITES, 'all_moe')))}, not {site!r}")
        own = self.blocks.filter(pc.equal(self.blocks["site"], site))
        layer = np.maximum(own["layer"].to_numpy(), 0)
        shape = (self.cases.num_rows, 1 if site == "all_moe" else self.identity["n_layers"])
        return self._per_case(shape, (self._case_rows(own), layer), own[column].to_numpy())

    @cached_property
    def ranking(self) -> list[Candidate]:
        """Experts active often enough in the discovery cases, the one that rescues most first."""
        protocol = self.protocol
        if len(self.places) == 1:
            found = candidates(self.grid, self.site("moe_out"), self.discovery, protocol.search, protocol.recurrence)
            return [replace(candidate, place=self.places[0]) for candidate in found]
        return best_first(candidate for place in self.places for candidate in self.at(place).ranking)

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
        own = self.experts.filter(self.experts["clean_active"])
        own = own.filter(pc.and_(pc.equal(own["layer"], layer), pc.equal(own["expert"], expert)))
        return self._per_case((self.cases.num_rows,), (self._case_rows(own),), own[column].to_numpy())

    def specificity(self, layer: int, expert: int) -> Float[np.ndarray, " case"]:
        """The expert's rescue minus the mean of the other experts active in its layer, in every case."""
        return self.grid.specificity(layer, expert, self.protocol.others, self.protocol.seed)

    def equal_norm(self, layer: int, expert: int) -> EqualNorm:
        """The expert's rescue beside that of the active expert with the nearest routing weight, both patches being scaled to the
        length of the shorter one; nan where the clean run does not go to it."""
        active = self.grid.active[:, layer, expert]
        columns = ("rescue_equal_norm", "matched_equal_norm")
        return EqualNorm(*(np.where(active, self.expert(layer, expert, column), np.nan) for column in columns))

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
        found = "no expert recurs" if chosen is None else f"L{chosen.layer}E{chosen.expert} chosen at {PLACES[chosen.place]}"
        return f"{self.cases.num_rows} cases of {self.identity['model']}, mean drop {drop:.2f} logits, {found}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tables and what they are of into a directory."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        records: FileRecords = {}
        for name in TABLES:
            with atomic_path(directory / f"{name}.parquet") as temporary:
                write_parquet(getattr(self, name), temporary)
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
            if name != "cases" and "place" not in pq.read_schema(file).names:
                raise ValueError(f"{file} was written by an earlier version, which patched last tokens only; trace again")
        return cls(**{name: pq.read_table(directory / f"{name}.parquet") for name in TABLES}, identity=identity)
