"""The two paired tests of the audit: Student's t (1908) and Wilcoxon's signed ranks (1945).

Both suppose independent pairs. Over documents they keep their level. Positions sampled from few documents are alike: with
200 positions of 48 short documents, clustered as benchmarks/CALIBRATION.md says, t finds an effect of none in 5.8% of runs
and Wilcoxon's test in 7.2%, with 12 documents in 8.7% and 14.0%, at a nominal 5%.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Num

from hooked_moe.statistics.samples import paired_differences


@dataclass(frozen=True)
class PairedT:
    n: int
    mean_difference: float
    sd_difference: float  # ddof=1
    t: float
    p: float  # two-sided, n - 1 degrees of freedom

    @property
    def sign(self) -> int:
        return int(np.sign(self.t))


@dataclass(frozen=True)
class SignedRank:
    n: int  # pairs, zeros included
    n_zero: int  # pairs whose difference is exactly 0; left out of the ranking
    rank_sum_positive: float
    rank_sum_negative: float
    p: float  # two-sided

    @property
    def sign(self) -> int:
        return int(np.sign(self.rank_sum_positive - self.rank_sum_negative))


def paired_t(high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"]) -> PairedT:
    """Student's paired t-test, two-sided."""
    difference = paired_differences(high, low)
    n = len(difference)
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    t = mean / (sd / float(np.sqrt(n)))
    return PairedT(n, mean, sd, t, float(2 * scipy.special.stdtr(n - 1, -abs(t))))


def wilcoxon_signed_rank(high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"]) -> SignedRank:
    """Wilcoxon's signed-rank test, two-sided, as `scipy.stats.wilcoxon` with its defaults.

    Differences of exactly 0 are dropped before ranking (Wilcoxon's own rule) and reported as `n_zero`; equal magnitudes
    share their average rank. p is exact for up to 50 differences without ties or zeros and for up to 13 with them,
    otherwise normal with tie correction and no continuity correction.
    """
    difference = paired_differences(high, low)
    nonzero = difference[difference != 0]
    ranks = scipy.stats.rankdata(np.abs(nonzero))
    positive = float(ranks[nonzero > 0].sum())
    p = float(scipy.stats.wilcoxon(difference, zero_method="wilcox", correction=False, method="auto").pvalue)
    n = len(difference)
    return SignedRank(n, n - len(nonzero), positive, float(ranks.sum()) - positive, p)
