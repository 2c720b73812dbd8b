"""At every position, the loss change of the expert a ranking puts highest against that of the one it puts lowest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_moe.analysis.accumulators.documents import Documents, sums_from
from hooked_moe.statistics import spearman_of_ranks, within_position_ranks


@dataclass(frozen=True)
class Picked:
    """What a ranking picked at each position: loss changes of its highest and lowest expert, in nats."""

    high: Float[np.ndarray, " position"]
    low: Float[np.ndarray, " position"]
    tied: Bool[np.ndarray, " position"]  # an extreme was shared; the lower slot was taken
    undefined: Bool[np.ndarray, " position"]  # an active expert has no score

    @classmethod
    def from_scores(cls, score: Float[np.ndarray, "P K"], delta: Float[np.ndarray, "P K"]) -> "Picked":
        """argmax and argmin take the first of equals, which is the lower slot."""
        undefined = np.isnan(score).any(axis=1)
        rows = np.arange(len(score))
        top, bottom = score.argmax(axis=1), score.argmin(axis=1)
        shared = [(score == score[rows, pick][:, None]).sum(axis=1) > 1 for pick in (top, bottom)]
        high, low = (delta[rows, pick].astype(np.float64) for pick in (top, bottom))
        return cls(high, low, shared[0] | shared[1], undefined)


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
        centred = delta - delta.mean(axis=1, keepdims=True)
        ranks = within_position_ranks(delta)
        first, last = np.searchsorted(self._sorted, [self._seen, self._seen + len(document)])
        local, drawn = self._sorted[first:last] - self._seen, self._draw[first:last]
        self._seen += len(document)
        if not len(document):
            return
        for name, score in scores:
            if score is None:
                continue
            picked = Picked.from_scores(score, delta)
            for field in fields(Picked):
                getattr(self._sample[name], field.name)[drawn] = getattr(picked, field.name)[local]
            columns = _columns(picked, score, centred, ranks)
            self._sums[:, self.rankings.index(name), here] += sums_from(columns, starts).T

    def sums(self, ranking: str) -> ContrastSums:
        return ContrastSums(*self._sums[:, self.rankings.index(ranking)])

    def sample(self, ranking: str) -> Picked:
        """At the sampled positions, in the order drawn."""
        return self._sample[ranking]


def _columns(
    picked: Picked, score: Float[np.ndarray, "P K"], centred: Float[np.ndarray, "P K"], delta_ranks: Float[np.ndarray, "P K"]
) -> Float[np.ndarray, "P column"]:
    """The fields of ContrastSums at each position."""
    kept = ~picked.undefined
    difference = np.where(kept, picked.high - picked.low, 0.0)
    spearman = spearman_of_ranks(within_position_ranks(score), delta_ranks)
    correlated = ~np.isnan(spearman)
    known = np.where(kept[:, None], score, 0.0)
    known -= known.mean(axis=1, keepdims=True)
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
            np.einsum("pk,pk->p", known, centred),
            np.einsum("pk,pk->p", known, known),
        ],
        axis=1,
    )
