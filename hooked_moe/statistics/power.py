"""What a paired test can find: its power, the effect it detects, and how many documents it takes at the least."""

import functools

import numpy as np
import scipy


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
