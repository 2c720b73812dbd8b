"""How much of the loss changes could any fixed ranking of a layer's experts explain, and how much does a given one?

At a position with k active experts let c be the loss change of removing an expert less the mean over the k: all that a
choice among them can depend on. A fixed score s per expert predicts c by s less its mean over the k. The
least-squares expert effect explains most, and its share of the variance of c is the static ceiling: no criterion, being
one number per expert, can explain more of the variance. (It is not the ranking that saves most, where a few removals hold the
variance.) With x the k-centred indicators of the experts, S = x'c and G = x'x,

    ceiling = S' G^+ S / c'c,    share of a score z = (z'S)^2 / (z'G z) / c'c,    both between 0 and 1,

where G = diag(rows per expert) - co-activations / k. Taken on the same data both count noise as explained. Documents are
therefore dealt to folds, and the square of a sum over folds loses its within-fold products, whose noise is what does not
average out; the rest is scaled up for the products lost. The result is unbiased as far as folds are alike in which experts
they use, and may fall below 0 where there is nothing to explain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS, DegenerateSample, require_finite


@dataclass(frozen=True)
class StaticShare:
    share: float  # of the variance of the centred loss change
    se: float  # delete-one-fold jackknife
    of_ceiling: float  # share / ceiling; NaN where the ceiling is not above 0
    of_ceiling_se: float
    slope: float  # nats of centred loss change per unit of score; below 0 where the score points the wrong way
    n_undefined: int  # rows of experts without a score, for which the mean of the others was taken


class StaticCeiling:
    """Accumulates one layer, chunk by chunk; memory is n_folds x n_experts^2, whatever the length of the corpus.

    A document's fold is its number modulo `n_folds`; every document must be numbered alike in all chunks.
    """

    def __init__(self, n_experts: int, n_folds: int = 10) -> None:
        if n_experts < 2 or n_folds < MINIMUM_PAIRS:
            raise ValueError(f"needs 2 experts and {MINIMUM_PAIRS} folds at least, got {n_experts} and {n_folds}")
        self.n_experts, self.n_folds = n_experts, n_folds
        self._sum = np.zeros((n_folds, n_experts))
        self._together = np.zeros((n_folds, n_experts, n_experts), np.int64)
        self._square = np.zeros(n_folds)
        self._slots = 0
        self._ceilings: tuple[float, np.ndarray] | None = None  # of all folds and of all but one, as of the last `add`

    def add(
        self,
        document: Int[np.ndarray, " position"],
        expert: Int[np.ndarray, "position slot"],
        delta: Float[np.ndarray, "position slot"],
    ) -> None:
        """Loss changes in nats, one row per position. Raises ValueError for NaN: leave positions without a target out."""
        require_finite("delta", delta)
        slots = expert.shape[1]
        if slots < 2 or self._slots not in (0, slots):
            raise ValueError(
                f"every position needs the same number of active experts, 2 or more; got {slots} after {self._slots}"
            )
        if len(expert) and not (expert.min() >= 0 and expert.max() < self.n_experts):
            raise ValueError(f"experts must be 0 to {self.n_experts - 1}, got {expert.min()} to {expert.max()}")
        self._slots, self._ceilings = slots, None
        fold = self.fold(document)
        centred = delta - delta.mean(axis=1, dtype=np.float64, keepdims=True)
        place = fold[:, None] * self.n_experts + expert
        self._sum += np.bincount(place.ravel(), centred.ravel(), self._sum.size).reshape(self._sum.shape)
        self._square += np.bincount(fold, (centred**2).sum(axis=1), self.n_folds)
        for slot in range(slots):
            pairs = place[:, slot : slot + 1] * self.n_experts + expert
            self._together += np.bincount(pairs.ravel(), minlength=self._together.size).reshape(self._together.shape)

    def fold(self, document: Int[np.ndarray, " position"]) -> Int[np.ndarray, " position"]:
        return np.asarray(document, np.int64) % self.n_folds

    def ceiling(self) -> StaticShare:
        """The share that the best fixed score would explain; its slope is 1 by definition."""
        share, replicates = self._replicated_ceiling()
        return StaticShare(share, _jackknife(replicates), 1.0, 0.0, 1.0, 0)

    def share(self, score: Num[np.ndarray, " expert"]) -> StaticShare:
        """The share that a criterion explains, used linearly; give its ranks to judge the order alone.

        Raises DegenerateSample where the score is alike for all experts that meet.
        """
        used = self._uses().sum(axis=0)
        filled, n_undefined = _filled(np.asarray(score, np.float64), used)
        total = self._design(slice(None))
        if filled @ total @ filled <= 1e-12 * used.sum() * np.square(filled).max():
            raise DegenerateSample("the score is the same for all experts that are active together; it ranks nothing")
        share, replicates = self._replicated(lambda folds: self._share_of(filled, folds))
        slope = float(filled @ self._sum.sum(axis=0) / (filled @ total @ filled))
        return self._relative(share, replicates, slope, n_undefined)

    def oracle(self) -> StaticShare:
        """What the loss changes of other documents tell: each fold's rows by the expert effects of the other folds.

        The squared correlation of prediction and outcome, kept below the ceiling by the noise of the effects alone.
        """
        scores = self.oracle_scores()
        uses = self._uses()
        predicted = [_filled(s, n) for s, n in zip(scores, uses, strict=True)]
        product = np.array([s @ total for (s, _), total in zip(predicted, self._sum, strict=True)])
        size = np.array([s @ self._design([fold]) @ s for fold, (s, _) in enumerate(predicted)])

        def share_of(folds: list[int]) -> float:
            return float(product[folds].sum() * abs(product[folds].sum()) / (size[folds].sum() * self._square[folds].sum()))

        share, replicates = self._replicated(share_of)
        return self._relative(share, replicates, float(product.sum() / size.sum()), sum(n for _, n in predicted))

    def oracle_scores(self) -> Float[np.ndarray, "fold expert"]:
        """Least-squares expert effects in nats from all folds but one; NaN for experts that the others never use."""
        present = self._present()
        scores = np.full((self.n_folds, self.n_experts), np.nan)
        for fold in range(self.n_folds):
            others = [other for other in present if other != fold]
            effect = np.linalg.pinv(self._design(others), rcond=1e-10, hermitian=True) @ self._sum[others].sum(axis=0)
            used = self._uses()[others].sum(axis=0) > 0
            scores[fold, used] = effect[used]
        return scores

    def _uses(self) -> Int[np.ndarray, "fold expert"]:
        return np.diagonal(self._together, axis1=1, axis2=2)

    def _design(self, folds: list[int] | slice) -> Float[np.ndarray, "expert expert"]:
        together = self._together[folds].sum(axis=0)
        return np.diag(np.diagonal(together)) - together / self._slots

    def _present(self) -> list[int]:
        present = np.flatnonzero(self._uses().sum(axis=1)).tolist()
        if len(present) < MINIMUM_PAIRS:
            raise DegenerateSample(f"documents in {len(present)} folds; cross-fitting needs at least {MINIMUM_PAIRS}")
        if not self._square.sum() > 0:
            raise DegenerateSample("all experts of a position change the loss alike, everywhere; there is no variance to share")
        return present

    def _replicated(self, statistic: Callable[[list[int]], float]) -> tuple[float, Float[np.ndarray, " fold"]]:
        """A statistic of all folds, and of all but one."""
        present = self._present()
        return statistic(present), np.array([statistic([f for f in present if f != left_out]) for left_out in present])

    def _replicated_ceiling(self) -> tuple[float, Float[np.ndarray, " fold"]]:
        """Every score is compared with it, and it takes a decomposition for each fold: computed once."""
        if self._ceilings is None:
            self._ceilings = self._replicated(self._ceiling_of)
        return self._ceilings

    def _ceiling_of(self, folds: list[int]) -> float:
        inverse = np.linalg.pinv(self._design(folds), rcond=1e-10, hermitian=True)
        return self._between_folds(inverse, folds)

    def _share_of(self, score: Float[np.ndarray, " expert"], folds: list[int]) -> float:
        return self._between_folds(np.outer(score, score) / (score @ self._design(folds) @ score), folds)

    def _between_folds(self, form: Float[np.ndarray, "expert expert"], folds: list[int]) -> float:
        """S' form S without the products of a fold with itself, scaled up for their absence, over c'c."""
        sums = self._sum[folds]
        total = sums.sum(axis=0)
        within = np.einsum("fe,ed,fd->", sums, form, sums)
        weight = self._uses()[folds].sum(axis=1)
        lost = np.square(weight / weight.sum()).sum()
        return float((total @ form @ total - within) / (1 - lost) / self._square[folds].sum())

    def _relative(self, share: float, replicates: Float[np.ndarray, " fold"], slope: float, n_undefined: int) -> StaticShare:
        ceiling, ceilings = self._replicated_ceiling()
        if ceiling <= 0 or ceilings.min() <= 0:
            return StaticShare(share, _jackknife(replicates), np.nan, np.nan, slope, n_undefined)
        return StaticShare(share, _jackknife(replicates), share / ceiling, _jackknife(replicates / ceilings), slope, n_undefined)


def _filled(score: Float[np.ndarray, " expert"], used: Int[np.ndarray, " expert"]) -> tuple[Float[np.ndarray, " expert"], int]:
    """The score less its mean over rows, 0 for experts without one, and the number of rows these have."""
    if score.shape != used.shape:
        raise ValueError(f"a score per expert is wanted: {len(used)} values, got shape {score.shape}")
    known = np.isfinite(score)
    weight = np.where(known, used, 0)
    if not weight.any():
        raise DegenerateSample("no active expert has a score")
    mean = np.average(np.where(known, score, 0.0), weights=weight)
    return np.where(known, score - mean, 0.0), int(used[~known].sum())


def _jackknife(replicates: Float[np.ndarray, " fold"]) -> float:
    n = len(replicates)
    return float(np.sqrt((n - 1) / n * np.square(replicates - replicates.mean()).sum()))
