"""Results that are arrays over named axes, such as [layer, batch, pos, slot], and their long form: a row for every place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooked_moe.checks import unknown_name
from hooked_moe.tables.result import Result

_NAMED = 4
"""Columns that a repr names."""


@dataclass(frozen=True)
class Axis:
    """An axis that rows run over: a column of the long form."""

    meaning: str
    unit: str = "index"
    labels: str | None = None
    """The attribute that has a label for every place along the axis; None: places are counted from 0."""


@dataclass(frozen=True)
class Column:
    """An array of a result, and what it means."""

    axes: str
    """The names of its axes, as jaxtyping writes them: "layer batch pos slot". Where rows run over an axis that the array lacks,
    its values repeat. An axis that no row runs over makes lists; where these would repeat, they go into files alone, and not into
    `table()`."""
    unit: str
    meaning: str


T = TypeVar("T", bound="GridResult")


class GridResult(Result):
    """A dataclass of arrays over named axes. All that a `Result` has follows from its arrays' axes:

        @dataclass(frozen=True, repr=False)
        class HeadEffects(GridResult):
            layers: list[int]
            effect: Float[np.ndarray, "layer head"]

            AXES: ClassVar = {"layer": Axis("transformer block", labels="layers"), "head": Axis("attention head")}
            COLUMNS: ClassVar = {"effect": Column("layer head", "nats", "loss without the head minus loss with it")}

    Other attributes, labels among them, are `attributes()`: JSON values.
    """

    AXES: ClassVar[Mapping[str, Axis]]
    """What rows run over, outermost first. Some column must have each."""
    COLUMNS: ClassVar[Mapping[str, Column]]
    """The arrays, by attribute."""
    PRESENT: ClassVar[str | None] = None
    """The column of whole numbers whose -1 says that there is nothing at a place: `table()` has no row for it."""

    @classmethod
    def from_arrays(cls: type[T], arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> T:
        """The result again, from its arrays and `attributes()`."""
        return cls(**arrays, **attributes)

    def attributes(self) -> dict[str, Any]:
        """What is no array, as JSON values: by default the labels of the axes."""
        return {axis.labels: list(getattr(self, axis.labels)) for axis in self.AXES.values() if axis.labels is not None}

    def columns(self) -> Mapping[str, Column]:
        """`COLUMNS`, and what this one result has besides."""
        return self.COLUMNS

    def array(self, name: str) -> np.ndarray:
        """One column."""
        return np.asarray(getattr(self, name))

    def shape(self) -> dict[str, int]:
        """The length of every axis by its name, those that rows run over first."""
        sizes: dict[str, int] = {}
        for name, column in self.columns().items():
            for axis, size in zip(column.axes.split(), self.array(name).shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise ValueError(f"{name} has {size} along {axis}, where columns before it have {sizes[axis]}")
        return {axis: sizes.pop(axis) for axis in self.AXES} | sizes

    def summary(self) -> str:
        shape = self.shape()
        names = list(self.columns())
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{' x '.join(f'{shape[axis]} {axis}' for axis in self.AXES)}: {', '.join(names[:_NAMED])}{more}"

    def table(self) -> pa.Table:
        rows = self._table({name: column for name, column in self.columns().items() if self._in_rows(column)})
        return rows if self.PRESENT is None else rows.filter(pc.not_equal(rows[self.PRESENT], -1))

    def stored_table(self) -> pa.Table:
        return self._table(self.columns())

    def plot(self, value: str | None = None, across: str | None = None, **options: Any) -> Any:
        """A heat map of a column's means: the first axis by `across`, another axis or `PRESENT`, which says what expert it is.

        `value` is a column with a value for every row (default: the first one); nan counts nowhere. `options` go to
        `hooked_moe.figures.heat_map`. Raises `UnknownNameError` for other names.
        """
        from hooked_moe.figures import heat_map  # matplotlib takes a while to load

        first, *others = self.AXES
        if not others:
            return super().plot(**options)
        table = self.table()
        numbers = [field.name for field in table.schema if pa.types.is_primitive(field.type)]
        values = [name for name in numbers if name not in self.AXES and name != self.PRESENT]
        candidates = [*others, self.PRESENT] if self.PRESENT else others
        candidates = [axis for axis in candidates if axis in table.column_names]
        value, across = value or values[0], across or candidates[-1]
        if value not in values:
            raise unknown_name("column", value, values, f"This result has {', '.join(values)}.")
        if across not in candidates:
            raise unknown_name("axis", across, candidates, f"This result has {', '.join(candidates)}.")
        unit = table.schema.field(value).metadata[b"unit"].decode()
        row, column, values_there = (table[name].to_numpy() for name in (first, across, value))
        rows, columns, means = _means(row, column, values_there, every=across == self.PRESENT)
        words = {"row_label": first, "column_label": across.removesuffix("_index"), "value_label": f"mean {value} ({unit})"}
        return heat_map(means, **({"rows": rows, "columns": columns} | words | options))

    def metadata(self) -> dict[str, Any]:
        axes = {name: column.axes for name, column in self.columns().items()}
        return {"axes": axes, "shape": self.shape(), "attributes": self.attributes()}

    @classmethod
    def from_table(cls: type[T], table: pa.Table, metadata: Mapping[str, Any]) -> T:
        shape = metadata["shape"]
        arrays = {name: cls._from_column(table[name], axes.split(), shape) for name, axes in metadata["axes"].items()}
        return cls.from_arrays(arrays, metadata["attributes"])

    @classmethod
    def _from_column(cls, column: pa.ChunkedArray, axes: list[str], shape: Mapping[str, int]) -> np.ndarray:
        """The inverse of `_column`."""
        if any(axis not in cls.AXES for axis in axes):
            values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return values.reshape([shape[axis] for axis in axes]).copy()
        values = column.to_numpy().reshape([shape[axis] for axis in cls.AXES])
        return values[tuple(slice(None) if axis in axes else 0 for axis in cls.AXES)].copy()

    def _list_axes(self, column: Column) -> list[str]:
        return [axis for axis in column.axes.split() if axis not in self.AXES]

    def _in_rows(self, column: Column) -> bool:
        """Whether every row has a value, or a list, of its own or repeated."""
        return not self._list_axes(column) or set(self.AXES) <= set(column.axes.split())

    def _table(self, columns: Mapping[str, Column]) -> pa.Table:
        shape = self.shape()
        rows = [shape[axis] for axis in self.AXES]
        arrays, fields = [], []
        for place, (name, axis) in enumerate(self.AXES.items()):
            labels = np.arange(shape[name]) if axis.labels is None else np.asarray(getattr(self, axis.labels))
            labels = labels.astype(np.int32) if labels.dtype.kind == "i" else labels
            along = labels.reshape([-1 if other == place else 1 for other in range(len(rows))])
            arrays.append(pa.array(np.broadcast_to(along, rows).ravel()))
            fields.append(_field(name, arrays[-1], axis))
        for name, column in columns.items():
            arrays.append(self._column(name, column, rows))
            fields.append(_field(name, arrays[-1], column))
        return pa.table(arrays, schema=pa.schema(fields))

    def _column(self, name: str, column: Column, rows: list[int]) -> pa.Array:
        """A value for every row; or a list, in the first row of those that it belongs to, and null in the others."""
        values, axes, lists = self.array(name), column.axes.split(), self._list_axes(column)
        assert axes == [*(axis for axis in self.AXES if axis in axes), *lists], f"{name}: axes of rows come first, in their order"
        if not lists:
            own = np.expand_dims(values, [place for place, axis in enumerate(self.AXES) if axis not in axes])
            return pa.array(np.broadcast_to(own, rows).ravel())
        first = np.zeros(rows, bool)
        first[tuple(slice(None) if axis in axes else 0 for axis in self.AXES)] = True
        length = int(np.prod(values.shape[-len(lists) :]))
        offsets = np.concatenate([[0], np.cumsum(first.ravel() * length)])
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()), mask=pa.array(~first.ravel()))


def _means(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, every: bool) -> tuple[list[Any], list[Any], np.ndarray]:
    """The labels of rows and columns, and [row column] the mean of the values that have both; nan where there is none.

    `every` has a column for every number up to the highest.
    """
    own = np.isfinite(values)
    row_labels, row = np.unique(rows, return_inverse=True)
    column_labels, column = np.unique(columns, return_inverse=True)
    if every:
        column_labels, column = np.arange(columns.max(initial=-1) + 1), columns
    place, size = (row * len(column_labels) + column)[own], len(row_labels) * len(column_labels)
    with np.errstate(invalid="ignore"):
        means = np.bincount(place, values[own], size) / np.bincount(place, minlength=size)
    return row_labels.tolist(), column_labels.tolist(), means.reshape(len(row_labels), -1)


def _field(name: str, values: pa.Array, what: Axis | Column) -> pa.Field:
    return pa.field(name, values.type, metadata={"meaning": what.meaning, "unit": what.unit})
