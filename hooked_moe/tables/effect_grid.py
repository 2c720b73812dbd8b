"""The effect table as arrays over [position, layer, slot]: in pieces of bounded size, or whole.

The table is a full grid: every measured position has one row per layer and slot, in the order document, position,
layer, slot. `effect_chunks` checks that row by row as it reads, and drops the keys; what comes after indexes arrays.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from hooked_moe.tables.reading import parquet_batches, parquet_schema
from hooked_moe.tables.schemas import EFFECTS

TableOrPath: TypeAlias = pa.Table | str | os.PathLike[str]

_KEYS = ("document", "position", "layer", "slot")
_TYPES: dict[str, pa.DataType] = {"kl": pa.float32(), **{field.name: field.type for field in EFFECTS}}
"""Type of each column that is read; tables of before `kl` was measured lack it."""
EFFECT_VALUES = ("expert", "delta_loss", "routing_weight", "output_norm", "gap_norm")
CHUNK_ROWS = 1 << 20
"""Rows read at a time: some 30 MB a column in what is computed from them."""


@dataclass(frozen=True)
class EffectGrid:
    """An effect table with its keys taken out: P positions, L layers, K slots. Absent optional columns are None."""

    document: Int[np.ndarray, " P"]
    position: Int[np.ndarray, " P"]
    layers: tuple[int, ...]
    expert: Int[np.ndarray, "P L K"]
    delta_loss: Float[np.ndarray, "P L K"]  # nats; NaN in the rows where `valid` is False
    valid: Bool[np.ndarray, " P"]  # measured here; never at a document's last token, which has no next one
    routing_weight: Float[np.ndarray, "P L K"] | None = None
    output_norm: Float[np.ndarray, "P L K"] | None = None
    gap_norm: Float[np.ndarray, "P L K"] | None = None
    rest_cosine: Float[np.ndarray, "P L K"] | None = None
    rest_norm: Float[np.ndarray, "P L K"] | None = None
    first_order: Float[np.ndarray, "P L K"] | None = None
    first_order_curved: Float[np.ndarray, "P L K"] | None = None
    kl: Float[np.ndarray, "P L K"] | None = None
    """nats; KL divergence from the intact model's next-token distribution to the changed one's: the expected effect over next
    tokens drawn from the intact model. A number where delta_loss is one, and at times at a document's last token."""

    @property
    def n_slots(self) -> int:
        return self.expert.shape[2]

    def layer_axis(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not in the effect table; it has layers {list(self.layers)}")
        return self.layers.index(layer)

    def with_effects_of(self, other: "EffectGrid") -> "EffectGrid":
        """This grid with the other's effects, say another scope's, in the other's layers.

        Raises ValueError unless all keys agree and the other's layers are among these.
        """
        axes = [self.layer_axis(layer) for layer in other.layers]
        mine = self if list(other.layers) == list(self.layers) else self._at(layers=other.layers, index=(slice(None), axes))
        for name in ("document", "position", "expert"):
            if not np.array_equal(getattr(mine, name), getattr(other, name)):
                raise ValueError(f"the two effect tables differ in {name}; they are not two views of one measurement")
        return replace(mine, delta_loss=other.delta_loss, kl=other.kl, valid=other.valid)

    def measured(self) -> "EffectGrid":
        """The positions whose removals were measured."""
        return self.at_positions(self.valid)

    def at_positions(self, chosen: Bool[np.ndarray, " P"] | Int[np.ndarray, " chosen"]) -> "EffectGrid":
        """Some of the positions, by mask or by number."""
        keys = {name: getattr(self, name)[chosen] for name in ("document", "position", "valid")}
        return self._at(layers=self.layers, index=(chosen,), **keys)

    def _at(self, layers: tuple[int, ...], index: tuple[object, ...], **keys: np.ndarray) -> "EffectGrid":
        values = {name: getattr(self, name) for name in _VALUES}
        taken: dict[str, Any] = {name: None if array is None else array[index] for name, array in values.items()}
        return replace(self, layers=layers, **taken, **keys)


_VALUES = tuple(field.name for field in fields(EffectGrid) if field.name in _TYPES and field.name not in _KEYS)


def effect_chunks(
    source: TableOrPath, columns: Sequence[str] = EFFECT_VALUES, rows: int = CHUNK_ROWS, effect: str = "delta_loss"
) -> Iterator[EffectGrid]:
    """Read an effect table (parquet file or pyarrow table) in order, as grids of about `rows` rows.

    A chunk holds whole positions; a document may continue in the next chunk. Two tables of the same positions, layers and
    slots are cut at the same positions. `columns` picks the values to keep; those the table lacks stay None, except
    expert and delta_loss, which it must have. `effect` is another column that takes the place of delta_loss: a table of
    estimates has nothing measured.

    Raises ValueError that names the first offending row where the rows are not sorted by document, position, layer,
    slot, where a position lacks a layer or slot, where delta_loss is missing for part of a position or infinite, or
    where the routing weights rise from one slot to the next.
    """
    names, batches = _open(source, dict.fromkeys((*_KEYS, "expert", effect, *columns)), rows, effect)
    layout: _Layout | None = None
    held: dict[str, list[np.ndarray]] = {name: [] for name in names}
    n_held = 0
    for batch in batches:
        for name, pieces in held.items():
            pieces.append(column_values(batch, name))
        n_held += batch.num_rows
        if layout is None and n_held >= rows and _past_first_position(held):
            layout = _Layout.from_first_position(*(np.concatenate(held[name]) for name in _KEYS))
        size = 0 if layout is None else layout.chunk_rows(rows)
        while layout is not None and n_held >= size:
            joined = {name: np.concatenate(pieces) for name, pieces in held.items()}
            yield layout.grid({name: values[:size] for name, values in joined.items()}, effect)
            held = {name: [values[size:]] for name, values in joined.items()}
            n_held -= size
    if layout is None:
        if n_held == 0:
            raise ValueError("the effect table has no rows")
        layout = _Layout.from_first_position(*(np.concatenate(held[name]) for name in _KEYS))
    if n_held:
        yield layout.grid({name: np.concatenate(pieces) for name, pieces in held.items()}, effect)


def _past_first_position(held: dict[str, list[np.ndarray]]) -> bool:
    return any(held[name][-1][-1] != held[name][0][0] for name in ("document", "position"))


def _open(
    source: TableOrPath, wanted: dict[str, None], rows: int, effect: str
) -> tuple[list[str], Iterator[pa.Table | pa.RecordBatch]]:
    """The wanted columns that the table has, and its rows in batches."""
    batches: Iterator[pa.Table | pa.RecordBatch]
    if isinstance(source, pa.Table):
        names = source.column_names
        batches = (source.slice(start, rows) for start in range(0, source.num_rows, rows))
    else:
        names = parquet_schema(source).names
        batches = parquet_batches(source, [name for name in wanted if name in names], rows)
    missing = [name for name in (*_KEYS, "expert", effect) if name not in names]
    if missing:
        raise ValueError(f"not an effect table: column {', '.join(missing)} missing; it has {', '.join(names)}")
    return [name for name in wanted if name in names], batches


def column_values(batch: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
    """A column of the effect table as numpy, in the schema's type. ValueError for nulls and for values out of range."""
    column = batch.column(name)
    if column.null_count:
        raise ValueError(f"column {name} of the effect table has {column.null_count} nulls; write NaN or leave rows out")
    column = column.cast(_TYPES[name])
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _valid_positions(
    delta: Float[np.ndarray, "P L K"], document: Int[np.ndarray, " P"], position: Int[np.ndarray, " P"]
) -> Bool[np.ndarray, " P"]:
    missing = np.isnan(delta)
    none, every = ~missing.any(axis=(1, 2)), missing.all(axis=(1, 2))
    mixed = np.flatnonzero(~(none | every))
    infinite = np.flatnonzero(np.isinf(delta).any(axis=(1, 2)))
    for rows, fault in ((mixed, "is NaN for some removals but not for all"), (infinite, "is infinite")):
        if len(rows):
            where = f"document {document[rows[0]]}, position {position[rows[0]]}"
            raise ValueError(f"delta_loss {fault} at {where} ({len(rows)} such positions); the measurement is broken there")
    return none


class _Layout:
    """The pattern of rows that the first position sets and every other must repeat; checks each piece against it in turn."""

    def __init__(self, layers: np.ndarray, n_slots: int) -> None:
        self.layers = layers
        self.n_slots = n_slots
        self.rows_read = 0
        self.last: tuple[int, int] | None = None  # (document, position) read last

    @classmethod
    def from_first_position(cls, document: np.ndarray, position: np.ndarray, layer: np.ndarray, slot: np.ndarray) -> "_Layout":
        later = (document != document[0]) | (position != position[0])
        size = int(np.argmax(later)) if later.any() else len(document)
        layers = np.unique(layer[:size])
        slots = np.unique(slot[:size])
        if len(layers) * len(slots) != size or not np.array_equal(slots, np.arange(len(slots))):
            raise ValueError(
                f"the first position of the effect table has {size} rows, which is not one for each of its layers "
                f"{layers.tolist()} and of its slots {slots.tolist()}, counted from 0: rows must be sorted by document, "
                "position, layer, slot"
            )
        return cls(layers, len(slots))

    @property
    def position_rows(self) -> int:
        return len(self.layers) * self.n_slots

    def chunk_rows(self, rows: int) -> int:
        """The number of rows nearest below `rows` that makes whole positions, at least one."""
        return max(1, rows // self.position_rows) * self.position_rows

    def grid(self, columns: dict[str, np.ndarray], effect: str) -> EffectGrid:
        """Checked, and without its keys."""
        document, position, shape = self._keys(*(columns.pop(name) for name in _KEYS))
        values = {name: array.reshape(shape) for name, array in columns.items()}
        values["delta_loss"] = values[effect]
        valid = _valid_positions(values["delta_loss"], document, position)
        if "kl" in values:
            torn = np.flatnonzero(valid & ~np.isfinite(values["kl"]).all(axis=(1, 2)))
            if len(torn):
                where = f"document {document[torn[0]]}, position {position[torn[0]]}"
                raise ValueError(
                    f"kl is NaN or infinite where delta_loss is a number, at {where}; the measurement is broken there"
                )
        if "routing_weight" in values:
            rises = np.flatnonzero((np.diff(values["routing_weight"], axis=2) > 1e-6).any(axis=(1, 2)))
            if len(rises):
                where = f"document {document[rises[0]]}, position {position[rises[0]]}"
                raise ValueError(f"slots are not in falling order of routing weight at {where}; slot 0 must be the highest")
        return EffectGrid(document, position, tuple(self.layers.tolist()), valid=valid, **values)

    def _keys(
        self,
        document: Int[np.ndarray, " rows"],
        position: Int[np.ndarray, " rows"],
        layer: Int[np.ndarray, " rows"],
        slot: Int[np.ndarray, " rows"],
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
        """Document and position of each position, and the shape [P, L, K]; ValueError where the rows break the pattern."""
        first_row = self.rows_read
        self.rows_read += len(document)
        if len(document) % self.position_rows:
            raise ValueError(
                f"the effect table is incomplete: {self.rows_read} rows are no multiple of the {len(self.layers)} layers x "
                f"{self.n_slots} slots of its first position"
            )
        shape = (len(document) // self.position_rows, len(self.layers), self.n_slots)
        blocks = {name: keys.reshape(shape) for name, keys in zip(_KEYS, (document, position, layer, slot), strict=True)}
        expected = {
            "document": blocks["document"][:, :1, :1],
            "position": blocks["position"][:, :1, :1],
            "layer": self.layers[:, None],
            "slot": np.arange(self.n_slots),
        }
        wrong = np.zeros(shape, bool)
        for name, block in blocks.items():
            wrong |= block != expected[name]
        if wrong.any():
            row = int(np.argmax(wrong))
            at = np.unravel_index(row, shape)
            actual = ", ".join(f"{name} {block[at]}" for name, block in blocks.items())
            due = ", ".join(f"{name} {np.broadcast_to(expected[name], shape)[at]}" for name in blocks)
            raise ValueError(
                f"row {first_row + row} of the effect table is {actual} where {due} was due: rows must be sorted by document, "
                "position, layer, slot, and every position must have the same layers and slots"
            )
        documents, positions = (keys[:: self.position_rows].copy() for keys in (document, position))
        self._check_order(documents, positions)
        return documents, positions, shape

    def _check_order(self, document: Int[np.ndarray, " P"], position: Int[np.ndarray, " P"]) -> None:
        before = [] if self.last is None else [self.last]
        keys = np.concatenate([np.array(before, np.int64).reshape(-1, 2), np.stack([document, position], axis=1)])
        step = np.diff(keys, axis=0)
        falls = np.flatnonzero((step[:, 0] < 0) | ((step[:, 0] == 0) & (step[:, 1] <= 0)))
        if len(falls):
            (one, at), (other, there) = keys[falls[0]], keys[falls[0] + 1]
            raise ValueError(
                f"document {other}, position {there} comes after document {one}, position {at}: the positions of the effect "
                "table must be sorted, and each must occur once"
            )
        self.last = (int(document[-1]), int(position[-1]))
