"""Unbiased totals over all removals from exact effects of a sample, with cheap estimates of all as control variate.

The estimate of a total is the sum of the cheap estimates, plus that of what they missed at each removal drawn, divided by its
probability (the difference estimator; Cassel, Särndal and Wretman, 1976). A removal's *estimated effect* is its term of that sum,
so that whatever is linear in effects (means, savings, sums by document) can be taken of these as if all had been measured.

What the cheap estimates lack is fitted on the removals drawn in documents of the other fold, never on a document's own, which
keeps this exactly unbiased. Where few removals were drawn the spread that they show is no guide: none of the few that cost most
may be among them. So the variance of a group's total is its own, moderated by that of a model over all removals, as if the
latter came from `PRIOR_REMOVALS` more: benchmarks/CALIBRATION.md has how often the intervals hold the truth.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float, Int, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS

N_FOLDS = 2
PRIOR_REMOVALS = 20
MINIMUM_TO_FIT = 20
"""Removals drawn in a layer, below which its corrections are those of all layers together."""
BIN_EDGES = np.geomspace(1e-4, 3.0, 12)
"""nats of size; the variance model has one ratio in each bin."""
N_BINS = len(BIN_EDGES) + 1
_OF_LAYER = (1e-4, 1e4)
"""Within which a layer's errors are from those of all layers, so that one where none was seen does not pass for exact."""
Z = 1.959963984540054


def fold_of(document: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows"]:
    return np.asarray(document, np.int64) % N_FOLDS


def corrections(
    missed: Float[np.ndarray, " pick"],
    features: Float[np.ndarray, "pick feature"],
    probability: Float[np.ndarray, " pick"],
    size: Float[np.ndarray, " pick"],
    axis: Int[np.ndarray, " pick"],
    fold: Int[np.ndarray, " pick"],
    n_layers: int,
) -> Float[np.ndarray, "layer fold feature"]:
    """Least-squares coefficients of what an estimate misses, for each layer and fold from the other folds' removals.

    Large removals miss more: each counts by its size to the power of -1.5, and by how rarely such a one is drawn.
    """
    result = np.zeros((n_layers, N_FOLDS, features.shape[1]))
    weight = 1 / (probability * (1e-4 + size**1.5))
    for own in range(N_FOLDS):
        others = fold != own
        for layer in range(n_layers):
            chosen = others & (axis == layer)
            if chosen.sum() < MINIMUM_TO_FIT:
                chosen = others
            if chosen.sum() < MINIMUM_TO_FIT:
                continue
            root = np.sqrt(weight[chosen])
            result[layer, own] = np.linalg.lstsq(features[chosen] * root[:, None], missed[chosen] * root, rcond=None)[0]
    return result


def size_bin(size: Float[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows"]:
    return np.searchsorted(BIN_EDGES, size)


def error_ratios(
    error: Float[np.ndarray, " pick"],
    probability: Float[np.ndarray, " pick"],
    size: Float[np.ndarray, " pick"],
    axis: Int[np.ndarray, " pick"],
    n_layers: int,
) -> Float[np.ndarray, "layer bin"]:
    """The mean squared error of estimates over that of sizes, by layer and bin; each drawn towards its bin's in all layers times
    its layer's, and the former towards that of all bins, by how many removals were drawn.

    Layers differ by more than bins do (in the last one the estimates are all but exact): without a factor of its own, what a
    layer's bins are drawn towards would be another's.
    """
    prior = 20
    key = axis * N_BINS + size_bin(size)
    shape = (n_layers, N_BINS)
    square, scale, n = (
        np.bincount(key, weights, n_layers * N_BINS).reshape(shape)
        for weights in (error**2 / probability, size**2 / probability, np.ones(len(key)))
    )
    tiny = np.finfo(np.float64).tiny
    overall = square.sum() / max(scale.sum(), tiny)
    by_bin = square.sum(axis=0) / np.maximum(scale.sum(axis=0), tiny)
    by_bin = (n.sum(axis=0) * by_bin + prior * overall) / (n.sum(axis=0) + prior)
    drawn = n.sum(axis=1)
    relative = square.sum(axis=1) / np.maximum((scale * by_bin).sum(axis=1), tiny)
    of_layer = np.clip(relative, *_OF_LAYER) ** (drawn / (drawn + prior))
    own = square / np.maximum(scale, tiny)
    return (n * own + prior * of_layer[:, None] * by_bin) / (n + prior)


@dataclass(frozen=True)
class SamplingVariance:
    """Of totals over any groups of removals, over which removals were drawn."""

    own: Float[np.ndarray, "*group"]
    """Sum over those drawn of v = error^2 (1 - p) / p^2, which is without bias."""
    own_square: Float[np.ndarray, "*group"]
    """Sum of v^2."""
    model: Float[np.ndarray, "*group"]
    """Sum over all removals of size^2 (1 - p) / p times the ratio of its layer and bin."""

    def moderated(self) -> Float[np.ndarray, "*group"]:
        """Both, weighted by the effective number of removals behind each: (sum v)^2 / sum v^2 of the group's own, which is small
        where one of them makes up all of it, and `PRIOR_REMOVALS`."""
        effective = np.divide(self.own**2, self.own_square, out=np.zeros(self.own.shape), where=self.own_square > 0)
        return np.asarray((effective * self.own + PRIOR_REMOVALS * self.model) / (effective + PRIOR_REMOVALS))

    def over(self, axis: int) -> "SamplingVariance":
        """Of groups joined along an axis: removals are drawn one by one, so that variances add up."""
        return SamplingVariance(*(np.asarray(x.sum(axis)) for x in (self.own, self.own_square, self.model)))


@dataclass(frozen=True)
class SavingVariance:
    """Of totals that rankings save, over which removals were drawn."""

    of_all: SamplingVariance
    """Of the totals of all removals."""
    of_first: SamplingVariance
    """Of those that each ranking makes first."""
    n_slots: int

    def of(
        self, share: Float[np.ndarray, "*group"] | float = 0.0
    ) -> tuple[Float[np.ndarray, "*group"], Float[np.ndarray, "*group"]]:
        """Its own and the moderated one, of the saving less a share of the cost of random removals. A saving counts each of the k
        active experts by 1 / k, and the one pruned first by 1 / k - 1; less the share, they count by share / k less."""
        weight = (1 - share) / self.n_slots
        own, moderated = (
            np.asarray(np.maximum(weight**2 * every + (1 - 2 * weight) * first, 0.0))
            for every, first in (
                (self.of_all.own, self.of_first.own),
                (self.of_all.moderated(), self.of_first.moderated()),
            )
        )
        return own, moderated


def half_width_over_documents(
    over: Float[np.ndarray, "document *group"],
    under: Num[np.ndarray, "document *group"],
    own: Float[np.ndarray, "*group"],
    moderated: Float[np.ndarray, "*group"],
) -> Float[np.ndarray, "*group"]:
    """Half of the 95% interval, over documents and over what was drawn, of a ratio of their sums: t times its standard error. NaN
    of fewer than three documents.

    `own` and `moderated` are variances of the sum above over what was drawn. The spread of documents' sums holds both
    uncertainties; what of it is of what was drawn is replaced by the moderated one, for it is as uncertain there as anywhere.
    """
    documents, total = len(over), under.sum(axis=0)
    if documents < MINIMUM_PAIRS:
        return np.full(np.shape(total), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = over - over.sum(axis=0) / total * under
        both = np.square(residual).sum(axis=0) * documents / (documents - 1)
        error = np.sqrt(np.maximum(both - own, 0.0) + moderated) / np.abs(total)
    return np.asarray(float(scipy.stats.t.ppf(0.975, documents - 1)) * error)
