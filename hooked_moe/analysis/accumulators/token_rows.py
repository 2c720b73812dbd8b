"""The token ids of a corpus, in step with the chunks of an effect table."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.tables.effect_grid import EffectGrid

_COLUMNS = ("document", "position", "token")


class TokenRows:
    """tokens.parquet, read as far as each chunk goes: it has the positions of the effect table, in the same order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches: Iterator[dict[str, np.ndarray]] = row_batches(path, _COLUMNS)
        self._held = {name: np.zeros(0, np.int64) for name in _COLUMNS}

    def of(self, observed: EffectGrid) -> Int[np.ndarray, " P"]:
        """The token at each position of the next chunk. Raises ValueError where the two tables differ in positions."""
        n = len(observed.document)
        while len(self._held["token"]) < n:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"{self._path} has fewer positions than the effect table; they are not of one measurement")
            self._held = {name: np.append(values, batch[name]) for name, values in self._held.items()}
        head = {name: values[:n] for name, values in self._held.items()}
        self._held = {name: values[n:] for name, values in self._held.items()}
        for name in ("document", "position"):
            if not np.array_equal(head[name], getattr(observed, name)):
                raise ValueError(f"{self._path} and the effect table differ in {name}; they are not of one measurement")
        return head["token"]
