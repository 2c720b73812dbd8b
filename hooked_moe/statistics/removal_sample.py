"""Which removals a budgeted audit makes: a random sample whose chances follow from cheap estimates of all of them.

Every removal is drawn by itself, with a probability of its own (Poisson sampling): in proportion to its *size*, what it could
cost by the estimates, over a floor that all share, and over another that gives every expert some removals. The size is

    |curved - first order| + min(gap_scale ||gap||^2, LARGEST) + |first order| / 10        (nats)

for the estimates miss most where the softmax bends most, which the curvature and the square of the gap norm both tell; the scale
of a layer makes the two alike in sum. On the shipped models 1% of the removals by gap norm hold nine tenths of the squared error.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

UNIFORM_SHARE = 0.4
"""Part of the budget that all removals share alike."""
MINIMUM_PER_EXPERT = 10
"""Removals of every expert to expect, where it has as many; never more than half of the budget in all."""
LARGEST = 5.0
"""nats; the square of a gap norm grows without bound, what a removal costs does not."""
FIRST_ORDER_PART = 0.1


def removal_size(
    first_order: Float[np.ndarray, "*rows"],
    curved: Float[np.ndarray, "*rows"],
    gap_norm: Float[np.ndarray, "*rows"],
    gap_scale: Float[np.ndarray, "*#rows"],
) -> Float[np.ndarray, "*rows"]:
    """What each removal could cost, in nats, up to a factor."""
    first = np.asarray(first_order, np.float64)
    return np.abs(curved - first) + gap_term(gap_norm, gap_scale) + FIRST_ORDER_PART * np.abs(first)


def gap_term(gap_norm: Float[np.ndarray, "*rows"], gap_scale: Float[np.ndarray, "*#rows"]) -> Float[np.ndarray, "*rows"]:
    """The expected effect as the square of the gap norm alone tells it, in nats."""
    return np.minimum(gap_scale * np.square(np.asarray(gap_norm, np.float64)), LARGEST)


@dataclass(frozen=True)
class RemovalSample:
    """The chances of all removals of a run, in a few numbers."""

    gap_scale: Float[np.ndarray, " layer"]
    least: Float[np.ndarray, "layer expert"]
    """The smallest probability of any removal of the expert."""
    factor: float
    """What a nat of size adds to it."""

    def probability(
        self, axis: Int[np.ndarray, "*#rows"], expert: Int[np.ndarray, "*rows"], size: Float[np.ndarray, "*rows"]
    ) -> Float[np.ndarray, "*rows"]:
        """Of removals in the layers with these numbers."""
        return np.minimum(1.0, self.least[axis, expert] + self.factor * size)


def least_probabilities(removals: Int[np.ndarray, "layer expert"], share: float) -> Float[np.ndarray, "layer expert"]:
    """The floors: a part of the share for all, and more for experts with few removals."""
    if not 0 < share <= 1:
        raise ValueError(f"a budget is a share of the removals above 0 and up to 1, not {share:g}")
    total = int(removals.sum())
    known = removals > 0
    minimum = min(MINIMUM_PER_EXPERT, share * total / 2 / max(1, int(known.sum())))
    own = np.minimum(1.0, np.divide(minimum, removals, out=np.zeros(removals.shape), where=known))
    return np.maximum(own, UNIFORM_SHARE * share)


def sample_factor(least: Float[np.ndarray, " removal"], size: Float[np.ndarray, " removal"], share: float) -> float:
    """The factor by which sizes enter, so that `share` of the removals is drawn on average; 0 where the floors take it all."""
    wanted = share * len(size)
    low, high = 0.0, 1.0
    while high < 1e12 and _expected(least, size, high) < wanted:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _expected(least, size, middle) < wanted else (low, middle)
    return low


def _expected(least: Float[np.ndarray, " removal"], size: Float[np.ndarray, " removal"], factor: float) -> float:
    pieces = range(0, len(size), 1 << 20)
    return sum(float(np.minimum(1.0, least[i : i + (1 << 20)] + factor * size[i : i + (1 << 20)]).sum()) for i in pieces)


class UniformNumbers:
    """What decides which removals are drawn: those whose probability is above their number. Each document has its own numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._document: int | None = None

    def of(self, document: int, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
        """The next numbers of a document, whose positions may come in several pieces."""
        if document != self._document:
            self._document, self._random = document, np.random.default_rng([self._seed, document])
        return self._random.random(shape)
