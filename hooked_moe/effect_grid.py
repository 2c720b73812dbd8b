"""The effect table in memory: arrays over [position, layer, slot].

The table is a full grid: every measured position has one row per layer and slot, in the order document, position,
layer, slot. `read_effects` checks that once, row by row, and drops the keys; what comes after indexes arrays.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from hooked_moe.tables import EFFECTS

Source: TypeAlias = pa.Table | str | os.PathLike[str]

_KEYS = ("document", "position", "layer", "slot")
EFFECT_VALUES = ("expert", "delta_loss", "routing_weight", "output_norm", "gap_norm")


@dataclass(frozen=True)
class EffectGrid:
    """An effect table with its keys taken out: P positions, L layers, K slots. Absent optional columns are None."""

    document: Int[np.ndarray, " P"]
    position: Int[np.ndarray, " P"]
    layers: tuple[int, ...]
    expert: Int[np.ndarray, "P L K"]
    delta_loss: Float[np.ndarray, "P L K"]  # nats; NaN in the rows where `valid` is False
    valid: Bool[np.ndarray, " P"]  # the document has a next token here
    routing_weight: Float[np.ndarray, "P L K"] | None = None
    output_norm: Float[np.ndarray, "P L K"] | None = None
    gap_norm: Float[np.ndarray, "P L K"] | None = None

    @property
    def n_slots(self) -> int:
        return self.expert.shape[2]

    def layer_axis(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not in the effect table; it has layers {list(self.layers)}")
        return self.layers.index(layer)

    def with_effects_of(self, other: "EffectGrid") -> "EffectGrid":
        """This grid with the other's delta_loss, say another scope's. Raises ValueError unless all keys agree."""
        for name in ("document", "position", "layers", "expert"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"the two effect tables differ in {name}; they are not two views of one measurement")
        return replace(self, delta_loss=other.delta_loss, valid=other.valid)


def read_effects(source: "Source | EffectGrid", columns: Sequence[str] = EFFECT_VALUES) -> EffectGrid:
    """Read an effect table (parquet file, by row group, or pyarrow table) into arrays over [position, layer, slot].

    `columns` picks the values to keep; those the table lacks stay None, except expert and delta_loss, which it must
    have. Memory is that of the columns kept. Raises ValueError that names the first offending row where the rows are
    not sorted by document, position, layer, slot, where a position lacks a layer or slot, where delta_loss is missing
    for part of a position or infinite, or where the routing weights rise from one slot to the next.
    """
    if isinstance(source, EffectGrid):
        return source
    wanted = dict.fromkeys((*_KEYS, "expert", "delta_loss", *columns))
    if isinstance(source, pa.Table):
        names, n_rows, batches = source.column_names, source.num_rows, iter([source])
    else:
        file = pq.ParquetFile(source)
        names, n_rows = file.schema_arrow.names, file.metadata.num_rows
        kept = [name for name in wanted if name in names]
        batches = (file.read_row_group(i, columns=kept, use_threads=False) for i in range(file.num_row_groups))
    missing = [name for name in (*_KEYS, "expert", "delta_loss") if name not in names]
    if missing:
        raise ValueError(f"not an effect table: column {', '.join(missing)} missing; it has {', '.join(names)}")
    if n_rows == 0:
        raise ValueError("the effect table has no rows")

    flat = {name: np.empty(n_rows, EFFECTS.field(name).type.to_pandas_dtype()) for name in wanted if name in names}
    start = 0
    for batch in batches:
        for name, values in flat.items():
            values[start : start + batch.num_rows] = column_values(batch, name)
        start += batch.num_rows
    document, position, layers, shape = _check_layout(*(flat.pop(name) for name in _KEYS))
    grid = {name: values.reshape(shape) for name, values in flat.items()}
    valid = _valid_positions(grid["delta_loss"], document, position)
    if "routing_weight" in grid:
        rises = np.flatnonzero((np.diff(grid["routing_weight"], axis=2) > 1e-6).any(axis=(1, 2)))
        if len(rises):
            where = f"document {document[rises[0]]}, position {position[rises[0]]}"
            raise ValueError(f"slots are not in falling order of routing weight at {where}; slot 0 must be the highest")
    return EffectGrid(document, position, layers, valid=valid, **grid)


def column_values(batch: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
    """A column of the effect table as numpy, in the schema's type. ValueError for nulls and for values out of range."""
    column = batch.column(name)
    if column.null_count:
        raise ValueError(f"column {name} of the effect table has {column.null_count} nulls; write NaN or leave rows out")
    column = column.cast(EFFECTS.field(name).type)
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


def _check_layout(
    document: Int[np.ndarray, " rows"],
    position: Int[np.ndarray, " rows"],
    layer: Int[np.ndarray, " rows"],
    slot: Int[np.ndarray, " rows"],
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], tuple[int, int, int]]:
    """Keys of the positions and the shape [P, L, K] of a full, sorted grid; ValueError where the rows are not one.

    The first position sets the pattern: its layers and slots must be repeated by every other.
    """
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
    if len(document) % size:
        raise ValueError(
            f"the effect table is incomplete: {len(document)} rows are no multiple of the {len(layers)} layers x "
            f"{len(slots)} slots of its first position"
        )
    shape = (len(document) // size, len(layers), len(slots))
    blocks = {name: keys.reshape(shape) for name, keys in zip(_KEYS, (document, position, layer, slot), strict=True)}
    expected = {
        "document": blocks["document"][:, :1, :1],
        "position": blocks["position"][:, :1, :1],
        "layer": layers[:, None],
        "slot": slots,
    }
    wrong = np.zeros(shape, bool)
    for name, block in blocks.items():
        wrong |= block != expected[name]
    if wrong.any():
        row = int(np.argmax(wrong))
        at = np.unravel_index(row, shape)
        found = ", ".join(f"{name} {block[at]}" for name, block in blocks.items())
        due = ", ".join(f"{name} {np.broadcast_to(expected[name], shape)[at]}" for name in blocks)
        raise ValueError(
            f"row {row} of the effect table is {found} where {due} was due: rows must be sorted by document, position, "
            "layer, slot, and every position must have the same layers and slots"
        )
    documents, positions = document[::size].copy(), position[::size].copy()
    step = np.diff(np.stack([documents, positions]).astype(np.int64), axis=1)
    falls = np.flatnonzero((step[0] < 0) | ((step[0] == 0) & (step[1] <= 0)))
    if len(falls):
        i = falls[0]
        raise ValueError(
            f"document {documents[i + 1]}, position {positions[i + 1]} comes after document {documents[i]}, position "
            f"{positions[i]}: the positions of the effect table must be sorted, and each must occur once"
        )
    return documents, positions, tuple(layers.tolist()), shape
