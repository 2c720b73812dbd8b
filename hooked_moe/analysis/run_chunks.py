"""The effect tables of a run in pieces: the same positions in each of them."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hooked_moe.analysis.cells import AUDIT_COLUMNS
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks

COLUMNS = (*AUDIT_COLUMNS, "kl", "rest_cosine", "rest_norm")
"""What is read of effects.parquet."""


@dataclass(frozen=True)
class RunChunk:
    """The same positions in every table of effects that a run has."""

    observed: EffectGrid
    measured: dict[str, EffectGrid]
    """The positions with removals, by scope. Which these are may differ."""


def run_chunks(run: Path) -> Iterator[RunChunk]:
    """All of them in order, each read while the one before is worked on."""
    chunks = _read_chunks(run)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = reader.submit(next, chunks, None)
            yield chunk


def _read_chunks(run: Path) -> Iterator[RunChunk]:
    chunks = effect_chunks(run / "effects.parquet", COLUMNS)
    path = run / "effects_sequence.parquet"
    if not path.is_file():
        for chunk in chunks:
            yield RunChunk(chunk, {"position": chunk.measured()})
        return
    for chunk, other in itertools.zip_longest(chunks, effect_chunks(path, ("expert", "delta_loss"))):
        if chunk is None or other is None:
            raise ValueError(f"{path} and effects.parquet differ in length; they are not two views of one measurement")
        everywhere = chunk.with_effects_of(other)
        yield RunChunk(chunk, {"position": chunk.measured(), "sequence": everywhere.measured()})
