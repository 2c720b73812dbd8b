"""Two one-sided tests (Schuirmann, 1987): is an effect small enough to be equivalent to zero?

The larger of the two one-sided p is the p of "the effect lies outside the bounds"; at p <= .05 the 90% interval lies
inside them, and the other way round.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Num

from hooked_moe.statistics.effect_size import ClusteredEffect, dz_interval
from hooked_moe.statistics.paired import paired_t

LEVEL = 0.05
CONFIDENCE = 1 - 2 * LEVEL


@dataclass(frozen=True)
class Equivalence:
    p: float  # larger of the two one-sided p
    low: float  # 90% interval of the effect
    high: float
    bounds: tuple[float, float]

    @property
    def equivalent(self) -> bool:
        return self.p <= LEVEL


def tost_paired(high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"], lower: float, upper: float) -> Equivalence:
    """Equivalence of paired samples: is the mean difference `high - low` inside (lower, upper), in the data's unit?"""
    sample = paired_t(high, low)
    return _student(sample.mean_difference, sample.sd_difference / float(np.sqrt(sample.n)), sample.n - 1, lower, upper)


def equivalence(effect: ClusteredEffect, bound: float = 0.1) -> Equivalence:
    """Is a clustered d_z inside (-bound, bound)? By its jackknife error and t with clusters - 1 degrees of freedom."""
    return _student(effect.d, effect.se, effect.n - 1, -_positive(bound), bound)


def equivalence_dz(t: float, n: int, bound: float = 0.1) -> Equivalence:
    """Is the population's d_z inside (-bound, bound)? Exact (noncentral t) for n independent pairs with paired t."""
    noncentrality = _positive(bound) * np.sqrt(n)
    # nctdtr is accurate for a noncentrality above 0; the lower test is its mirror image
    p = max(float(scipy.special.nctdtr(n - 1, noncentrality, side)) for side in (t, -t))
    return Equivalence(p, *dz_interval(t, n, CONFIDENCE), (-bound, bound))


def _student(estimate: float, se: float, df: int, lower: float, upper: float) -> Equivalence:
    if not lower < upper:
        raise ValueError(f"equivalence needs lower < upper, got lower={lower:g} and upper={upper:g}")
    if se == 0:
        raise ValueError(f"the estimate {estimate:g} has a standard error of 0; there is nothing to test")
    p = max(float(scipy.special.stdtr(df, t)) for t in ((lower - estimate) / se, (estimate - upper) / se))
    reach = se * float(scipy.special.stdtrit(df, 1 - LEVEL))
    return Equivalence(p, estimate - reach, estimate + reach, (lower, upper))


def _positive(bound: float) -> float:
    if bound <= 0:
        raise ValueError(f"an equivalence bound must be above 0, got {bound:g}")
    return bound
