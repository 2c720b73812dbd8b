"""Which kinds of text an expert serves, and where its effect lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.report.explorer.json_numbers import number, numbers
from hooked_moe.report.explorer.texts import Texts


class Kinds:
    """Sums by layer, expert and kind of text: the domains of the corpus."""

    def __init__(self, texts: Texts, layers: list[int], n_experts: int, routing: pa.Table | None, sums: pa.Table) -> None:
        self.names = sorted(set(texts.domains))
        self._kind = np.array([self.names.index(domain) for domain in texts.domains])
        self._axes = {layer: axis for axis, layer in enumerate(layers)}
        self._shape = (len(layers), n_experts, len(self.names))
        self.n_removals = self._by_kind(sums, "n_removals")
        self._delta = self._by_kind(sums, "sum_delta_loss")
        self._kl = self._by_kind(sums, "sum_kl") if "sum_kl" in sums.column_names else None
        self._selections = None if routing is None else self._by_kind(routing, "n_tokens")
        self._tokens = np.bincount(self._kind, [texts.length(document) for document in range(len(texts))], len(self.names))

    def _by_kind(self, table: pa.Table, column: str) -> Float[np.ndarray, "layer expert kind"]:
        layer, expert, document = (table[name].to_numpy() for name in ("layer", "expert", "document"))
        axis = np.searchsorted(list(self._axes), layer)  # they rise
        key = np.ravel_multi_index((axis, expert.astype(np.int64), self._kind[document]), self._shape)
        return np.bincount(key, table[column].to_numpy(), int(np.prod(self._shape))).reshape(self._shape)

    @property
    def totals(self) -> Float[np.ndarray, "layer expert"] | None:
        """The expected effect over all removals of each expert, in nats; None where it was not measured."""
        return None if self._kl is None else self._kl.sum(axis=2)

    def mean_kl(self, layer: int, expert: int) -> float | None:
        """The mean expected effect of a removal; None where there was none."""
        if self._kl is None:
            return None
        own = self._axes[layer], expert
        return _ratio(self._kl[own].sum(), self.n_removals[own].sum())

    def of(self, layer: int, expert: int) -> dict[str, Any]:
        """By kind: the share of its tokens that the expert serves, and of the expert's effect; its mean effect there."""
        own = self._axes[layer], expert
        n, delta = self.n_removals[own], self._delta[own]
        found: dict[str, Any] = {"mean": [_ratio(*pair) for pair in zip(delta, n, strict=True)]}
        if self._selections is not None:
            found["routed"] = numbers(self._selections[own] / self._tokens)
        if self._kl is not None and self._kl[own].sum() > 0:
            share, served = self._kl[own] / self._kl[own].sum(), n / n.sum()
            found |= {"effect": numbers(share), "served": numbers(served), "focus": number((share - served).max())}
        return found


def _ratio(total: float, count: float) -> float | None:
    return number(total / count) if count else None
