"""Measurements of texts, each kept in a file of its own: a killed run resumes with the first text that lacks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from tqdm import tqdm

from hooked_moe.measurement.shards import in_parallel, workers_for
from hooked_moe.tables import write_parquet_atomic
from hooked_moe.transformer import Transformer

TextValues = Float[np.ndarray, "kind number"]
"""What is measured in one text: some kinds of numbers, as many of each."""


def measure_text_by_text(
    model: Transformer, texts: Sequence[int], measure: Callable[[int], TextValues], shards: Path, progress: bool
) -> dict[int, TextValues]:
    """What `measure` returns for every text, read from its shard or written to it. Several texts are measured side by side."""
    shards.mkdir(parents=True, exist_ok=True)
    paths = {text: shards / f"{text:06d}.parquet" for text in texts}

    def measure_texts(group: list[int]) -> list[int]:
        for text in group:
            values = measure(text)
            write_parquet_atomic(pa.table({str(kind): row for kind, row in enumerate(values)}), paths[text])
        return group

    pending = [text for text, path in paths.items() if not path.exists()]
    with tqdm(total=len(texts), desc=f"{shards.name}, whole texts", unit="text", disable=not progress) as bar:
        bar.update(len(texts) - len(pending))
        for done in in_parallel(measure_texts, [[text] for text in pending], workers_for(model, len(texts))):
            bar.update(len(done))
    tables = {text: pq.read_table(path, use_threads=False) for text, path in paths.items()}
    return {text: np.stack([column.to_numpy() for column in table.columns]) for text, table in tables.items()}
