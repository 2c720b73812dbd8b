"""At every position, the loss change of the expert a ranking puts highest against that of the one it puts lowest.

Arrays are laid out [slot, position], so that numpy runs along positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.savings import at_slot
from hooked_moe.statistics import correlation_of_ranks, twice_centred_ranks


@dataclass(frozen=True)
class Picked:
    """What a ranking picked at each position: loss changes of its highest and lowest expert, in nats."""

    high: Float[np.ndarray, " position"]
    low: Float[np.ndarray, " position"]
    tied: Bool[np.ndarray, " position"]  # an extreme was shared; the lower slot was taken
    undefined: Bool[np.ndarray, " position"]  # an active expert has no score

    @classmethod
    def from_scores(cls, score: Float[np.ndarray, "K P"], delta: Float[np.ndarray, "K P"]) -> "Picked":
        """argmax and argmin take the first of equals, which is the lower slot."""
        undefined = np.isnan(score).any(axis=0)
        tied = np.zeros(len(undefined), bool)
        for extreme in (score.max(axis=0), score.min(axis=0)):
            tied |= np.count_nonzero(score == extreme, axis=0) > 1
        high, low = (at_slot(delta, pick).astype(np.float64) for pick in (score.argmax(axis=0), score.argmin(axis=0)))
        return cls(high, low, tied, undefined)


@dataclass(frozen=True)
class ContrastSums:
    """Sums over each document's positions, of those where the ranking is defined (all but n_undefined)."""

    n: Float[np.ndarray, " document"]
    high: Float[np.ndarray, " document"]
    low: Float[np.ndarray, " document"]
    square: Float[np.ndarray, " document"]  # of high - low
    n_undefined: Float[np.ndarray, " document"]
    n_tied: Float[np.ndarray, " document"]
    spearman: Float[np.ndarray, " document"]  # within-position correlation of score and loss change
    n_spearman: Float[np.ndarray, " document"]  # positions where neither is constant
    cross: Float[np.ndarray, " document"]  # of score and loss change, each less its mean at the position
    score_square: Float[np.ndarray, " document"]  # of the score less its mean at the position


class ContrastAccumulator:
    """Every ranking in one layer: sums by document, and the sampled positions one by one."""

    def __init__(self, documents: Documents, rankings: Sequence[str], sample: Int[np.ndarray, " n"] | None) -> None:
        """`sample` numbers the sampled positions among the measured ones, in the order drawn."""
        self.documents = documents
        self.rankings = tuple(rankings)
        self._sums = np.zeros((len(fields(ContrastSums)), len(self.rankings), len(documents)))
        n = 0 if sample is None else len(sample)
        self._draw = np.arange(n) if sample is None else np.argsort(sample, kind="stable")
        self._sorted = np.zeros(0, np.int64) if sample is None else np.sort(sample)
        self._sample = {
            name: Picked(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool), np.ones(n, bool)) for name in self.rankings
        }
        self._seen = 0

    def update(
        self,
        document: Int[np.ndarray, " P"],
        delta: Float[np.ndarray, "P K"],
        scores: Iterable[tuple[str, Float[np.ndarray, "P K"] | None]],
    ) -> None:
        """Add the measured positions of a chunk, with each ranking's scores (None: not measured, passed over)."""
        here, starts = self.documents.split(document)
        first, last = np.searchsorted(self._sorted, [self._seen, self._seen + len(document)])
        local, drawn = self._sorted[first:last] - self._seen, self._draw[first:last]
        self._seen += len(document)
        if not len(document):
            return
        effect = np.ascontiguousarray(delta.T)
        centred = effect - effect.mean(axis=0)
        ranks = twice_centred_ranks(effect)
        for name, score in scores:
            if score is None:
                continue
            by_slot = np.ascontiguousarray(score.T)
            picked = Picked.from_scores(by_slot, effect)
            for field in fields(Picked):
                getattr(self._sample[name], field.name)[drawn] = getattr(picked, field.name)[local]
            columns = _columns(picked, by_slot, centred, ranks)
            self._sums[:, self.rankings.index(name), here] += np.add.reduceat(columns, starts, axis=1)

    def sums(self, ranking: str) -> ContrastSums:
        return ContrastSums(*self._sums[:, self.rankings.index(ranking)])

    def sample(self, ranking: str) -> Picked:
        """At the sampled positions, in the order drawn."""
        return self._sample[ranking]


def _columns(
    picked: Picked, score: Float[np.ndarray, "K P"], centred: Float[np.ndarray, "K P"], delta_ranks: Int[np.ndarray, "K P"]
) -> Float[np.ndarray, "column P"]:
    """The fields of ContrastSums at each position."""
    kept = ~picked.undefined
    difference = np.where(kept, picked.high - picked.low, 0.0)
    spearman = correlation_of_ranks(twice_centred_ranks(score), delta_ranks)
    correlated = kept & ~np.isnan(spearman)
    known = np.where(kept, score, 0.0)
    known -= known.mean(axis=0)
    return np.stack(
        [
            kept,
            np.where(kept, picked.high, 0.0),
            np.where(kept, picked.low, 0.0),
            difference**2,
            picked.undefined,
            picked.tied & kept,
            np.where(correlated, spearman, 0.0),
            correlated,
            np.einsum("kp,kp->p", known, centred),
            np.einsum("kp,kp->p", known, known),
        ]
    )
