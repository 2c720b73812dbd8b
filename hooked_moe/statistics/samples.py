"""What makes a sample fit for paired inference, and the error where it is not."""

import numpy as np
from jaxtyping import Float, Int, Num

MINIMUM_PAIRS = 3


class DegenerateSample(ValueError):
    """The data are well formed, but the statistic is undefined on them: too few pairs, or differences all alike."""


def paired_differences(high: Num[np.ndarray, " pair"], low: Num[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """`high - low` in float64.

    Raises ValueError for unequal lengths and for NaN or infinite values (counted in the message), `DegenerateSample`
    for fewer than three pairs and for differences without variance.
    """
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


def cluster_sums(
    cluster: Int[np.ndarray, " row"], values: Num[np.ndarray, " row"]
) -> tuple[Float[np.ndarray, " cluster"], Float[np.ndarray, " cluster"]]:
    """Rows and sum of `values` in each cluster, clusters in ascending order of their labels."""
    _, index = np.unique(cluster, return_inverse=True)
    return np.bincount(index).astype(np.float64), np.bincount(index, np.asarray(values, np.float64))


def require_finite(name: str, values: Num[np.ndarray, "..."]) -> None:
    """Raises ValueError, with their number, where values are NaN or infinite."""
    broken = np.count_nonzero(~np.isfinite(values))
    if broken:
        raise ValueError(
            f"{broken} of {values.size} values of {name} are NaN or infinite; leave them out by a rule you can state"
        )
