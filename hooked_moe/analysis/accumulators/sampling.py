"""How uncertain totals of estimated effects are by which removals were drawn: sums for layers, experts and rankings."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.savings import Ranking, extremes
from hooked_moe.analysis.estimated_effects import EFFECTS, EstimatedGrid
from hooked_moe.statistics.difference_estimates import N_BINS, SamplingVariance


class SamplingSums:
    """Sums over groups of removals, each of which adds to one group."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.n_drawn = np.zeros(shape, np.int64)
        self._own, self._square = ({effect: np.zeros(shape) for effect in EFFECTS} for _ in range(2))
        self._spread = np.zeros((*shape, N_BINS))

    def add(
        self,
        first: int,
        group: Int[np.ndarray, " removal"],
        chunk: EstimatedGrid,
        chosen: tuple[slice | np.ndarray | int, ...],
    ) -> None:
        """Add the chosen removals of a chunk to groups of the last axis, at the flat number `first` of the other axes."""
        size = self.shape[-1]

        def sums(values: np.ndarray) -> np.ndarray:
            return np.bincount(group, values[chosen].ravel(), size)

        self.n_drawn.reshape(-1, size)[first] += sums(chunk.drawn).astype(np.int64)
        for effect, variance in chunk.variance.items():
            self._own[effect].reshape(-1, size)[first] += sums(variance)
            self._square[effect].reshape(-1, size)[first] += sums(variance**2)
        key = group * N_BINS + chunk.bin[chosen].ravel()
        by_bin = np.bincount(key, chunk.spread[chosen].ravel(), size * N_BINS).reshape(size, N_BINS)
        self._spread.reshape(-1, size, N_BINS)[first] += by_bin

    def variance(self, effect: str, ratios: Float[np.ndarray, "layer bin"]) -> SamplingVariance:
        """The first axis of the groups is the layer."""
        model = np.einsum("l...b,lb->l...", self._spread, ratios)
        return SamplingVariance(self._own[effect], self._square[effect], model)


class SamplingAccumulator:
    """Of every expert, and of the active experts that each ranking prunes first. A layer's is the sum over its experts."""

    def __init__(self, layers: tuple[int, ...], n_experts: int, n_rankings: int) -> None:
        self.layers = layers
        self.experts = SamplingSums((len(layers), n_experts))
        self.pruned_first = SamplingSums((len(layers), n_rankings, 1))

    def update_experts(self, chunk: EstimatedGrid) -> None:
        for axis in range(len(self.layers)):
            at = chunk.effects.layer_axis(self.layers[axis])
            expert = chunk.effects.expert[:, at].astype(np.int64).ravel()
            self.experts.add(axis, expert, chunk, (slice(None), at))

    def update_rankings(self, axis: int, chunk: EstimatedGrid, rankings: Iterable[Ranking]) -> None:
        """In the layer with this number."""
        at = chunk.effects.layer_axis(self.layers[axis])
        n_rankings = self.pruned_first.shape[1]
        for ranking in rankings:
            first, _, kept = extremes(ranking.keys)
            position = np.flatnonzero(kept)
            group = np.zeros(len(position), np.int64)
            self.pruned_first.add(
                axis * n_rankings + ranking.number,
                group,
                chunk,
                (position, np.full(len(position), at), first[position].astype(np.int64)),
            )
