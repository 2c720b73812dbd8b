"""Is a list of scores about the experts, or would any other list of numbers have done as well?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PermutationTest:
    z: float  # standard deviations of the permuted scores' statistic that lie between the observed one and their mean
    p: float  # two-sided
    n: int  # permutations


def permutation_test(observed: float, permuted: Float[np.ndarray, " permutation"]) -> PermutationTest:
    """The statistic of a list of scores among those of the same scores dealt to the experts at random.

    p is twice the smaller of the two tails, the observed list counted among the permuted: (1 + count) / (1 + n) each (Phipson and
    Smyth, 2010), so that it is exact, and at least 2 / (1 + n). Experts differ, and every list of numbers agrees or disagrees
    with their differences by chance: documents cannot tell that apart from knowledge, however many there are. This test can.
    """
    n = len(permuted)
    spread = float(permuted.std(ddof=1)) if n > 1 else 0.0
    z = float((observed - permuted.mean()) / spread) if spread > 0 else np.nan
    rounding = 1e-12 * max(abs(observed), float(np.abs(permuted).max(initial=0.0)))
    tails = [1 + np.count_nonzero(sign * permuted >= sign * observed - rounding) for sign in (1, -1)]
    return PermutationTest(z, min(1.0, 2 * min(tails) / (1 + n)), n)
