"""The most extreme entries of every expert over the chunks of an effect table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Scored:
    """Values of every active expert at some tokens; NaN where there is none."""

    layers: Sequence[int]
    document: Int[np.ndarray, " P"]
    position: Int[np.ndarray, " P"]
    expert: Int[np.ndarray, "P layer slot"]
    value: np.ndarray


class TopHeap:
    """The n most extreme entries of every (layer, expert), over any number of chunks in the order of the texts."""

    def __init__(self, n: int, lowest: bool = False) -> None:
        self.n, self.sign = n, -1.0 if lowest else 1.0
        self.entries = {name: np.zeros(0, np.int64) for name in ("layer", "expert", "document", "position")}
        self.value, self.rank = np.zeros(0, np.float32), np.zeros(0, np.int64)
        self.least: dict[int, np.ndarray] = {}
        """By layer, what an entry of each expert has to exceed."""

    @property
    def documents(self) -> list[int]:
        """Those that have an entry."""
        return np.unique(self.entries["document"]).tolist()

    def add_all(self, chunks: Iterable[Scored]) -> None:
        for scored in chunks:
            self.add(scored)

    def add(self, scored: Scored) -> None:
        for place, layer in enumerate(scored.layers):
            expert, value = scored.expert[:, place].astype(np.int64), self.sign * scored.value[:, place]
            least = self.least.setdefault(layer, np.full(0, -np.inf, np.float32))
            if len(least) <= expert.max(initial=-1):
                least = self.least[layer] = np.append(least, np.full(int(expert.max()) + 1 - len(least), -np.inf, np.float32))
            token, slot = np.nonzero(value > least[expert])
            new = {
                "layer": np.full(len(token), layer),
                "expert": expert[token, slot],
                "document": scored.document[token].astype(np.int64),
                "position": scored.position[token].astype(np.int64),
            }
            self.entries = {name: np.append(old, new[name]) for name, old in self.entries.items()}
            self.value = np.append(self.value, value[token, slot].astype(np.float32))
        self._keep_best()

    def _keep_best(self) -> None:
        own = self.entries
        order = np.lexsort((own["position"], own["document"], -self.value, own["expert"], own["layer"]))
        layer, expert = own["layer"][order], own["expert"][order]
        starts = np.flatnonzero(np.diff(layer, prepend=-1) | np.diff(expert, prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        order, kept_rank = order[rank < self.n], rank[rank < self.n]
        self.entries = {name: values[order] for name, values in own.items()}
        self.value, self.rank = self.value[order], kept_rank
        last = kept_rank == self.n - 1
        for layer, expert, value in zip(
            *(self.entries[name][last] for name in ("layer", "expert")), self.value[last], strict=True
        ):
            self.least[int(layer)][expert] = value
