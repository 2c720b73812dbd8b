"""Results that people can use: a short repr, a table in long form, files, and a picture where one is natural.

    effects = expert_effects(model, tokens)
    effects                                # one line
    effects.table(), effects.to_dataframe()
    effects.save("effects.parquet")
    effects = ExpertEffects.load("effects.parquet")
    effects.plot()

A class of results says what its rows are (`table`), what else belongs to it (`metadata`, JSON values), and how to make it again
of the two (`from_table`). All else is here. Files are parquet with checksums of their pages, and are never unpickled.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hooked_moe.tables.files import atomic_path, write_parquet
from hooked_moe.version import __version__

_KIND, _METADATA, _CHECKSUM, _VERSION = (f"hooked_moe.{name}".encode() for name in ("result", "metadata", "sha256", "version"))
ROWS_SHOWN = 8
_TEXT_SHOWN = 60
"""Characters of one cell."""


T = TypeVar("T", bound="Result")


class Result:
    """The base of all results."""

    def table(self) -> pa.Table:
        """One row per value, in long form; every field's metadata has its "meaning" and "unit"."""
        raise NotImplementedError(f"{type(self).__name__} must define table()")

    def metadata(self) -> dict[str, Any]:
        """What belongs to the result and is in no row, as JSON values."""
        return {}

    @classmethod
    def from_table(cls: type[T], table: pa.Table, metadata: Mapping[str, Any]) -> T:
        """The result again, from what `stored_table` and `metadata` gave."""
        raise NotImplementedError(f"{cls.__name__} must define from_table()")

    def stored_table(self) -> pa.Table:
        """The table that goes into a file, where it needs more columns than `table()` shows."""
        return self.table()

    def summary(self) -> str:
        """What the repr says in its parentheses."""
        table = self.table()
        return f"{table.num_rows:,} rows: {', '.join(table.column_names)}"

    def plot(self, **options: Any) -> Any:
        """A figure of the result, where its class has one; `NotImplementedError` where it has none."""
        raise NotImplementedError(f"{type(self).__name__} has no picture of its own: draw from its .table() or .to_dataframe()")

    def to_dataframe(self) -> Any:
        """`table()` as a pandas DataFrame. Raises `ImportError` where pandas is not installed."""
        try:
            import pandas  # noqa: F401  # optional
        except ImportError as error:
            raise ImportError(
                "to_dataframe() needs pandas: pip install pandas. Without it, table() has the same rows as a pyarrow table"
            ) from error
        return self.table().to_pandas()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result into one parquet file, under its name complete or not at all.

        Raises OSError that names the path where it cannot be written.
        """
        table = self.stored_table()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **self.file_labels()})
        with atomic_path(path) as temporary:
            write_parquet(table, temporary)

    def file_labels(self) -> dict[bytes, bytes]:
        """What a file says of its rows: the class, and `metadata()`."""
        metadata = json.dumps(self.metadata(), allow_nan=False, ensure_ascii=False).encode()
        kind, version = type(self).__name__.encode(), __version__.encode()
        return {_KIND: kind, _METADATA: metadata, _CHECKSUM: _checksum(metadata), _VERSION: version}

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """The result that `save` wrote.

        Raises FileNotFoundError for a missing file and ValueError for a file that is damaged, or holds something else.
        """
        metadata = cls.metadata_of_file(path)
        with readable(path):
            table = pq.read_table(path, page_checksum_verification=True)
        return cls.from_table(table, metadata)

    @classmethod
    def metadata_of_file(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What `save` wrote beside the rows. Raises as `load` does."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}: {cls.__name__}.load reads what save(path) wrote")
        with readable(path):
            labels = pq.read_schema(path).metadata or {}
        kind = labels.get(_KIND, b"").decode()
        if kind != cls.__name__:
            advice = f"use {kind}.load" if kind else "it was not written by save() of a result"
            raise ValueError(
                f"{path} holds {f'a result of class {kind}' if kind else 'another table'}, no {cls.__name__}: {advice}"
            )
        metadata = labels.get(_METADATA, b"")
        if labels.get(_CHECKSUM) != _checksum(metadata):
            raise ValueError(f"{path} is damaged: what it says of its rows has another checksum; save the result again")
        return json.loads(metadata)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def preview(self) -> tuple[pa.Table, int]:
        """The first rows, and how many there are."""
        table = self.table()
        return table.slice(0, ROWS_SHOWN), table.num_rows

    def _repr_html_(self) -> str:
        """The first rows, for notebooks."""
        return "".join(_html(repr(self), *self.preview()))


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that reads a file of a result: damage is a ValueError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged, or no parquet file ({error}): save the result again") from error


def _checksum(metadata: bytes) -> bytes:
    """Parquet has checksums of its pages and none of what stands beside them."""
    return hashlib.sha256(metadata).hexdigest().encode()


def _html(title: str, rows: pa.Table, total: int) -> Iterator[str]:
    def cells(tag: str, values: list[Any], show: Callable[[Any], str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(show(value))}</{tag}>" for value in values) + "</tr>"

    yield f"<p>{html.escape(title)}</p><table><thead>{cells('th', rows.column_names, str)}</thead><tbody>"
    for row in rows.to_pylist():
        yield cells("td", list(row.values()), _short)
    yield "</tbody></table>"
    if total > rows.num_rows:
        yield f"<p>… {total - rows.num_rows:,} more rows</p>"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 1] + "…"
