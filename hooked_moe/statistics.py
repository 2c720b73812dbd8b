"""Paired inference for the audit: tests, effect size, corrections, the agreement rule and power.

Every function takes float arrays of paired values, `high` (loss change from removing the expert ranked highest) and
`low` (ranked lowest), and is pure. All reject, by ValueError, inputs on which the statistic is undefined: fewer than
three pairs, unequal lengths, NaN or infinite values (counted in the message), differences without variance.

Sources: Student (1908); Wilcoxon (1945) with the normal approximation of scipy; the exact interval for a standardised
mean difference by inverting the noncentral t distribution (Cumming and Finch, 2001); Holm (1979).
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Float, Int, Num

MINIMUM_PAIRS = 3

Outcome = Literal["positive", "negative", "tests_disagree", "not_detected"]


class DegenerateSample(ValueError):
    """The data are well formed, but the statistic is undefined on them: too few pairs, or differences all alike."""


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


@dataclass(frozen=True)
class EffectSize:
    d: float
    low: float
    high: float
    n: int


def paired_differences(high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """`high - low` in float64, after the checks named in the module's docstring."""
    a, b = np.asarray(high, np.float64), np.asarray(low, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired samples must be two vectors of one length, got shapes {a.shape} and {b.shape}")
    broken = np.count_nonzero(~(np.isfinite(a) & np.isfinite(b)))
    if broken:
        raise ValueError(f"{broken} of {len(a)} pairs hold NaN or infinity; leave them out by a rule you can state")
    if len(a) < MINIMUM_PAIRS:
        raise DegenerateSample(f"{len(a)} pairs; paired inference needs at least {MINIMUM_PAIRS}")
    difference = a - b
    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(difference) <= rounding:
        raise DegenerateSample(f"all {len(a)} differences equal {difference[0]:g}; without variance there is no test")
    return difference


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


def cohens_dz(
    high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"], ddof: int = 1, confidence: float = 0.95
) -> EffectSize:
    """Mean over standard deviation of the paired differences, with the exact interval for its population value.

    `ddof` changes the estimate only (ddof=0 is larger by sqrt(n / (n - 1))); the interval is for mean/sd of the
    population and follows from t, whichever estimate is quoted.
    """
    difference = paired_differences(high, low)
    n = len(difference)
    t = float(difference.mean() / (difference.std(ddof=1) / np.sqrt(n)))
    return EffectSize(float(difference.mean() / difference.std(ddof=ddof)), *dz_interval(t, n, confidence), n)


def dz_interval(t: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval for d_z from the paired t statistic: the noncentralities at which t sits on either tail, / sqrt(n)."""
    tail = (1 - confidence) / 2
    # nctdtrinc is the inverse in the noncentrality; mirrored, because it is accurate for positive t
    size = abs(t)
    low = float(scipy.special.nctdtrinc(n - 1, 1 - tail, size) / np.sqrt(n))
    high = float(scipy.special.nctdtrinc(n - 1, tail, size) / np.sqrt(n))
    return (low, high) if t >= 0 else (-high, -low)


def clustered_dz(difference: Num[np.ndarray, " pair"], cluster: Int[np.ndarray, " pair"], confidence: float = 0.95) -> EffectSize:
    """d_z over all pairs, with an interval that lets the pairs of one cluster (a document) be as alike as they are.

    The estimate is mean / sd (ddof=1) over pairs. Its standard error is the delete-one-cluster jackknife, its interval
    the t interval with clusters - 1 degrees of freedom; `n` is the number of clusters.
    """
    values = np.asarray(difference, np.float64)
    paired_differences(values, np.zeros_like(values))
    _, index = np.unique(cluster, return_inverse=True)
    count = np.bincount(index).astype(np.float64)
    clusters = len(count)
    if clusters < MINIMUM_PAIRS:
        raise DegenerateSample(f"{clusters} clusters; a clustered interval needs at least {MINIMUM_PAIRS}")
    centre = values.mean()  # moments about the mean: leaving a cluster out then subtracts small numbers
    first = np.bincount(index, values - centre)
    second = np.bincount(index, (values - centre) ** 2)
    n = count.sum() - count
    if n.min() < 2:
        raise DegenerateSample("leaving one cluster out leaves fewer than two pairs; there is no jackknife")
    mean = (first.sum() - first) / n
    variance = ((second.sum() - second) - n * mean**2) / (n - 1)
    if variance.min() <= 0:
        raise DegenerateSample("leaving one cluster out leaves differences without variance; there is no jackknife")
    left_out = (mean + centre) / np.sqrt(variance)
    d = float(centre / values.std(ddof=1))
    error = np.sqrt((clusters - 1) / clusters * np.sum((left_out - left_out.mean()) ** 2))
    reach = float(error * scipy.special.stdtrit(clusters - 1, (1 + confidence) / 2))
    return EffectSize(d, d - reach, d + reach, clusters)


def bonferroni(p: Float[np.ndarray, " test"], n_tests: int | None = None) -> Float[np.ndarray, " test"]:
    """Adjusted p-values min(1, m p), `m` the number of tests (default: those given). NaN stays NaN and still counts."""
    return np.minimum(1.0, np.asarray(p, np.float64) * _family_size(p, n_tests))


def holm(p: Float[np.ndarray, " test"], n_tests: int | None = None) -> Float[np.ndarray, " test"]:
    """Holm's step-down adjusted p-values. NaN stays NaN; it counts in `m` and takes the last ranks (as p = 1 would)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")  # NaN last
    factors = _family_size(p, n_tests) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted


def _family_size(p: Float[np.ndarray, " test"], n_tests: int | None) -> int:
    m = len(p) if n_tests is None else n_tests
    if m < len(p):
        raise ValueError(f"a family of {m} tests cannot hold {len(p)} p-values")
    return m


def agreement(t_test: PairedT, wilcoxon: SignedRank, n_tests: int, alpha: float = 0.05) -> Outcome:
    """The one decision rule, for every cell alike: both tests pass at alpha / n_tests, and point the same way.

    "positive": the expert ranked high matters more when removed. "negative": it matters less. "tests_disagree": one
    test passes alone, or both pass with opposite signs. "not_detected": neither passes, which is no evidence of absence
    (see `minimal_detectable_d`).
    """
    passes = [bool(bonferroni(np.array([p]), n_tests)[0] <= alpha) for p in (t_test.p, wilcoxon.p)]
    if not any(passes):
        return "not_detected"
    if not all(passes) or t_test.sign != wilcoxon.sign:
        return "tests_disagree"
    return "positive" if t_test.sign > 0 else "negative"


def minimum_documents(n_tests: int, alpha: float = 0.05) -> int:
    """The least n at which n differences of one sign would pass the exact Wilcoxon test at alpha / n_tests.

    Its smallest p is 2 / 2^n: with fewer documents no data whatever could satisfy the agreement rule. Never under 10.
    """
    return max(10, int(np.ceil(1 + np.log2(n_tests / alpha))))


def power_paired_t(d: float, n: int, alpha: float) -> float:
    """Chance that the two-sided paired t-test rejects at level alpha, given the population's d_z and n pairs."""
    critical = scipy.special.stdtrit(n - 1, 1 - alpha / 2)
    noncentrality = abs(d) * np.sqrt(n)
    upper = scipy.special.nctdtr(n - 1, -noncentrality, -critical)  # mirrored: no 1 - x
    # The far tail; scipy returns NaN there, but only where numerical integration finds less than 2e-15.
    lower = np.nan_to_num(scipy.special.nctdtr(n - 1, noncentrality, -critical), nan=0.0)
    return float(np.minimum(1.0, upper + lower))


@functools.lru_cache(maxsize=1024)
def minimal_detectable_d(n: int, alpha: float, power: float = 0.8) -> float:
    """The d_z that the paired t-test at level alpha detects with the given power; the inverse of `power_paired_t`."""
    if not alpha < power < 1:
        raise ValueError(f"power must lie between alpha = {alpha} and 1, got {power}")
    top = 1.0
    while power_paired_t(top, n, alpha) < power:
        top *= 2
    return float(scipy.optimize.brentq(lambda d: power_paired_t(d, n, alpha) - power, 0.0, top, xtol=1e-10))
