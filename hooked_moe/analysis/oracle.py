"""The best fixed ranking that other documents could teach: experts by their mean effect there, shrunk, cross-fitted.

A document's positions are ranked by what the experts' removals cost in the documents of all other folds, so nothing of a position
decides its own ranking. Means are shrunk towards the layer's (`statistics.shrunk_means`): an expert seen a few times would
otherwise come first or last by luck.
"""

import numpy as np
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.statistics import DegenerateSample, shrunk_means

N_FOLDS = 10


def fold_of(document: Int[np.ndarray, " position"]) -> Int[np.ndarray, " position"]:
    """A document's fold is its number modulo N_FOLDS."""
    return np.asarray(document, np.int64) % N_FOLDS


def oracle_scores(sums: ExpertEffectSums, effect: str) -> Float[np.ndarray, "layer fold expert"]:
    """Mean effect of every expert outside each fold, in nats; NaN where fewer than three documents are left to take it from."""
    count, total = sums.counts(), sums.sums(effect)
    fold = fold_of(sums.documents())
    scores = np.full((len(sums.layers), N_FOLDS, sums.n_experts), np.nan)
    for axis in range(len(sums.layers)):
        for left_out in range(N_FOLDS):
            others = fold != left_out
            try:
                scores[axis, left_out] = shrunk_means(total[others, axis], count[others, axis]).mean
            except DegenerateSample:
                continue
    return scores
