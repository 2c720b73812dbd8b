"""How the files of a run are read: what cannot be read is named, with the way out."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from hooked_moe.json_text import JsonError, parse_json


def required_file(run: Path, name: str, origin: str) -> Path:
    """The path of a run's file. Raises FileNotFoundError, which says where the file comes from, if it is missing."""
    if not (run / name).is_file():
        if name == "effects.parquet" and (run / "sampled_effects.parquet").is_file():
            origin = (
                "this is a budgeted run, which made a sample of the removals (sampled_effects.parquet): no mean over it is one "
                "over all; budgeted.csv has the estimates; `hooked-moe audit` without --budget measures all, in another directory"
            )
        raise FileNotFoundError(f"{run / name} does not exist; {origin}")
    return run / name


def read_json(
    path: str | os.PathLike[str], remedy: str = "remove it, and the command that wrote it makes it again"
) -> dict[str, Any]:
    """A JSON object. Raises `ValueError`, which ends with the remedy, for anything else."""
    try:
        value = parse_json(Path(path).read_bytes())
    except JsonError as error:
        raise ValueError(f"{os.fspath(path)} is not readable JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)} holds no JSON object; {remedy}")
    return value


def read_csv(path: str | os.PathLike[str], schema: pa.Schema | None = None) -> pa.Table:
    """The inverse of `write_csv_atomic`, exact for columns in `schema`; the types of others are inferred, but for names that a
    corpus gives, which may look like numbers or dates.

    Raises `ValueError` that names the file where it holds no such table.
    """
    kinds = {"domain": pa.string()} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    options = pyarrow.csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=False)
    with _readable(path):
        return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=False), convert_options=options)


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A table, its pages checked against their checksums. Raises `ValueError` that names the file where it holds none."""
    with _readable(path):
        return pq.read_table(path, columns=columns, use_threads=False, page_checksum_verification=True)


def parquet_schema(path: str | os.PathLike[str]) -> pa.Schema:
    with _readable(path):
        return pq.read_schema(path)


def parquet_batches(path: str | os.PathLike[str], columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, `rows` rows at a time, in order; errors as in `read_parquet`."""
    with _readable(path), pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
        # buffered, all that was read would stay in memory
        yield from file.iter_batches(rows, columns=list(columns), use_threads=False)


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in the errors of a reader, which often do not."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read ({str(error).splitlines()[0]}): it is damaged, or not the table of its name; "
            "remove it, and the command that wrote it makes it again"
        ) from error
