"""Measurements of texts, each kept in a file of its own: a killed run resumes with the first text that lacks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.executors import in_parallel
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.shards import missing_units, workers_for
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

TABLE = "values"
"""The one table of a text's shard."""
TextValues = Float[np.ndarray, "kind number"]
"""What is measured in one text: some kinds of numbers, as many of each."""


def measure_text_by_text(
    model: Transformer, texts: Sequence[int], measure: Callable[[int], TextValues], shards: ShardFiles, progress: bool
) -> dict[int, TextValues]:
    """What `measure` returns for every text, read from its shard or written to it. Several texts are measured side by side."""
    units = [f"{text:06d}" for text in texts]

    def measure_text(number: int) -> None:
        values = measure(texts[number])
        shards.write(units[number], {TABLE: pa.table({str(kind): row for kind, row in enumerate(values)})})

    for pending in missing_units(shards, units):
        before, what = len(texts) - len(pending), f"{shards.directory.name}, whole texts"
        with progress_bar(len(texts), what, "text", shown=progress, done=before) as bar:
            for _ in in_parallel(measure_text, pending, workers_for(model, len(texts))):
                bar.update(1)
    tables = {text: shards.read(unit, TABLE) for text, unit in zip(texts, units, strict=True)}
    return {text: np.stack([column.to_numpy() for column in table.columns]) for text, table in tables.items()}
