"""How the files of a run are written; `reading` is the other half.

Files appear under their final name complete or not at all. Each write goes to a temporary file in the same directory,
is flushed to the disk, and is renamed over the target (`os.replace` is atomic within one file system). Contents depend
on the data alone, so a rerun produces the same bytes.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes the name `path` when the block ends well.

    An exception inside the block removes the temporary file and leaves any earlier `path` as it was. A killed process
    can leave a file `.NAME.PID.tmp`; `remove_temporaries` sweeps those.

    Raises OSError (with the original errno) that names the target where the directory is missing, is not writable, or
    the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.touch()
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, target)
            _sync_directory(target.parent)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, f"cannot write {target}: {_reason(error, target)}") from error
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)


def _reason(error: OSError, target: Path) -> str:
    text = os.strerror(error.errno or 0)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space or choose another directory, then run again"
    if error.errno == errno.ENOENT and not target.parent.exists():
        return f"the directory {target.parent} does not exist"
    if error.errno == errno.ENOTDIR:
        return f"{target.parent} is not a directory"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}; the directory {target.parent} must be writable"
    return text


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the platform lets a directory be opened."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directory: str | os.PathLike[str]) -> int:
    """Delete what killed writers left in `directory`; call it while nothing else writes there. Returns the count."""
    leftovers = sorted(Path(directory).glob(".*.tmp"))
    for path in leftovers:
        path.unlink()
    return len(leftovers)


def parquet_writer(schema: pa.Schema, path: str | os.PathLike[str]) -> pq.ParquetWriter:
    """Writes tables of a schema into one file, as all parquet files here are written: compressed, with a checksum of each page.

    Measured numbers are hardly ever equal: a dictionary of them, which arrow makes unless it is told not to, takes more space
    than they do, and three times as long.
    """
    counted = [field.name for field in schema if not pa.types.is_floating(field.type)]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=counted, write_page_checksum=True)


def write_parquet(table: pa.Table, path: str | os.PathLike[str], row_group_size: int | None = None) -> None:
    """Write a table under a name that nobody reads yet; see `parquet_writer`."""
    with parquet_writer(table.schema, path) as writer:
        writer.write_table(table, row_group_size)


def write_parquet_atomic(table: pa.Table, path: str | os.PathLike[str], *, row_group_size: int = 1 << 17) -> None:
    with atomic_path(path) as temporary:
        write_parquet(table, temporary, row_group_size)


def write_csv_atomic(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write numbers in their shortest exact decimal form, missing values as empty fields, NaN as `nan`."""
    with atomic_path(path) as temporary:
        pyarrow.csv.write_csv(table, temporary, pyarrow.csv.WriteOptions(quoting_style="needed"))


def write_json_atomic(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value with its keys sorted. Raises ValueError for NaN and infinity, which JSON cannot express."""
    write_text_atomic(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n", path)


def write_text_atomic(text: str, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
