"""The rows of a table that is no full grid, a bounded number at a time."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from hooked_moe.tables import parquet_batches, parquet_schema

ROWS = 1 << 20


def row_batches(source: pa.Table | str | os.PathLike[str], columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The named columns of a parquet file or table as numpy arrays, in order. Raises ValueError where one is missing."""
    batches: Iterator[pa.Table | pa.RecordBatch]
    if isinstance(source, pa.Table):
        names, batches = source.column_names, iter(source.to_batches(max_chunksize=ROWS))
    else:
        names, batches = parquet_schema(source).names, parquet_batches(source, columns, ROWS)
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{'the table' if isinstance(source, pa.Table) else source} has no column {', '.join(missing)}")
    for batch in batches:
        yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in columns}
