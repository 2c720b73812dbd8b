"""What is paid for removing the expert that a ranking prunes first, the one it prunes last, and one at random: sums by document.

Arrays are laid out [slot, position], so that numpy runs along positions: the ranks of a chunk's experts are looked up for each
slot, and a smallest or largest rank is found with its slot in one number, rank x slots + slot.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from hooked_moe.analysis.accumulators.documents import Documents, sums_from
from hooked_moe.statistics import correlation_of_ranks, twice_centred_ranks


class Ranking(NamedTuple):
    """One ranking at a chunk's positions in one layer: the lowest key is pruned first. NaN or below 0: undefined."""

    number: int
    keys: Num[np.ndarray, "slot position"]
    effects: tuple[str, ...]
    """Which effects it is asked about."""


@dataclass(frozen=True)
class SavingSums:
    """Sums over each document's positions, of those where the ranking is defined: [ranking, layer, document]."""

    n: Float[np.ndarray, "ranking layer document"]
    random: Float[np.ndarray, "ranking layer document"]  # effect of removing an active expert at random: the mean over slots
    lowest: Float[np.ndarray, "ranking layer document"]  # of removing the one pruned first
    highest: Float[np.ndarray, "ranking layer document"]  # of removing the one pruned last
    spearman: Float[np.ndarray, "ranking layer document"]  # within-position rank correlation of ranking and effect
    n_spearman: Float[np.ndarray, "ranking layer document"]  # positions where the effect is not constant
    slots: Float[np.ndarray, "ranking layer document slot"]  # how often the slot held the one pruned last, less the first
    slot_effect: Float[np.ndarray, "layer document slot"]  # effect by slot, over all positions
    n_slot: Float[np.ndarray, "layer document"]  # positions behind slot_effect


_SUMS = ("n", "random", "lowest", "highest", "spearman", "n_spearman")


class SavingAccumulator:
    """Every ranking in every layer, for each effect. Memory grows with documents, layers and rankings, not with positions."""

    def __init__(self, documents: Documents, n_layers: int, n_rankings: int, n_slots: int, effects: tuple[str, ...]) -> None:
        self.documents, self.effects = documents, effects
        shape = (n_rankings, n_layers, len(documents))
        self._sums = {effect: np.zeros((len(_SUMS), *shape)) for effect in effects}
        self._slots = {effect: np.zeros((*shape, n_slots), np.float32) for effect in effects}
        self._slot_effect = {effect: np.zeros((n_layers, len(documents), n_slots)) for effect in effects}
        self._n_slot = np.zeros((n_layers, len(documents)))

    def update(
        self,
        axis: int,
        document: Int[np.ndarray, " position"],
        effects: dict[str, Float[np.ndarray, "slot position"]],
        rankings: Iterable[Ranking],
    ) -> None:
        """Add a chunk's measured positions in the layer with this number; `document` is sorted."""
        here, starts = self.documents.split(document)
        if not len(document):
            return
        self._n_slot[axis, here] += sums_from(np.ones(len(document)), starts)
        means, ranks = {}, {}
        for name, effect in effects.items():
            self._slot_effect[name][axis, here] += sums_from(effect.T, starts)
            means[name], ranks[name] = effect.mean(axis=0, dtype=np.float64), twice_centred_ranks(effect)
        for ranking in rankings:
            first, last, kept = extremes(ranking.keys)
            own_ranks = twice_centred_ranks(ranking.keys)
            slots = _slot_balance(first, last, kept, starts, len(ranking.keys))
            for name in ranking.effects:
                correlation = correlation_of_ranks(own_ranks, ranks[name])
                known = ~np.isnan(correlation) & kept
                low, high = (at_slot(effects[name], slot) for slot in (first, last))
                columns = np.stack([kept, means[name], low, high, np.where(known, correlation, 0.0), known])
                columns[1:4] *= kept
                self._sums[name][:, ranking.number, axis, here] += np.add.reduceat(columns, starts, axis=1)
                self._slots[name][ranking.number, axis, here] += slots

    def sums(self, effect: str) -> SavingSums:
        every = dict(zip(_SUMS, self._sums[effect], strict=True))
        return SavingSums(**every, slots=self._slots[effect], slot_effect=self._slot_effect[effect], n_slot=self._n_slot)


def extremes(
    keys: Num[np.ndarray, "slot position"],
) -> tuple[Int[np.ndarray, " position"], Int[np.ndarray, " position"], Bool[np.ndarray, " position"]]:
    """Slots of the lowest and of the highest key, and the positions where all keys are defined.

    Of equal keys (per-token scores; ranks have none) the later slot is the lower, as its routing weight is.
    """
    n_slots = len(keys)
    if np.issubdtype(keys.dtype, np.integer):
        kept = keys.min(axis=0) >= 0
        with_slot = keys * n_slots + np.arange(n_slots)[:, None].astype(keys.dtype)
        return with_slot.min(axis=0) % n_slots, with_slot.max(axis=0) % n_slots, kept
    kept = ~np.isnan(keys).any(axis=0)
    return n_slots - 1 - keys[::-1].argmin(axis=0), keys.argmax(axis=0), kept


def at_slot(values: Float[np.ndarray, "slot position"], slot: Int[np.ndarray, " position"]) -> Float[np.ndarray, " position"]:
    n_positions = values.shape[1]
    return values.ravel()[slot.astype(np.int64) * n_positions + np.arange(n_positions)]


def _slot_balance(
    first: Int[np.ndarray, " position"],
    last: Int[np.ndarray, " position"],
    kept: Bool[np.ndarray, " position"],
    starts: Int[np.ndarray, " here"],
    n_slots: int,
) -> Int[np.ndarray, "here slot"]:
    number = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(first))))[kept] * n_slots
    size = len(starts) * n_slots
    counts = [np.bincount(number + slot[kept], minlength=size) for slot in (last, first)]
    return (counts[0] - counts[1]).reshape(len(starts), n_slots)
