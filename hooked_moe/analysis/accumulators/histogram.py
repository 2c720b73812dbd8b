"""Quantiles of a stream, from counts in bins of one relative width."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int

_MANTISSA_BITS = 11  # kept of float32's 23: a bin is 2^-11 of its octave wide
_SMALLEST, _LARGEST = -30, 10  # powers of two; |values| below the first share a bin
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (127 + _SMALLEST) << _MANTISSA_BITS  # 127: float32's exponent bias
_BINS = (_LARGEST - _SMALLEST) << _MANTISSA_BITS  # of one sign


def _edges() -> Float[np.ndarray, " edge"]:
    """Lower edges of the bins of one sign, and the upper edge of the last."""
    edges = (np.arange(_FIRST, _FIRST + _BINS + 1, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    edges[0] = 0
    return edges


class Histogram:
    """Counts of float32 values in groups, over bins of 0.05% relative width, for quantiles within half of that.

    The bins are a float's own leading bits (sign, exponent, first 11 of the mantissa), as in an HDR histogram. 160 000 counters
    of four bytes a group, whatever passes through.
    """

    def __init__(self, n_groups: int) -> None:
        self._counts = np.zeros((n_groups, 2 * _BINS), np.uint32)

    def add(self, group: Int[np.ndarray, " value"], values: Float32[np.ndarray, " value"]) -> None:
        """Count each value in its group. Raises ValueError for NaN and for values from 1,024 on, either sign."""
        size = np.abs(values)
        if not (size < 2.0**_LARGEST).all():
            wrong = values[~(size < 2.0**_LARGEST)]
            raise ValueError(f"{len(wrong)} values, the first {wrong[0]}, are NaN or outside (-{2**_LARGEST}, {2**_LARGEST})")
        bits = size.view(np.uint32).astype(np.int64) >> _SHIFT
        size_bin = np.maximum(bits - _FIRST, 0)
        bins = np.where(values < 0, _BINS - 1 - size_bin, _BINS + size_bin)
        counter, found = np.unique(group * (2 * _BINS) + bins, return_counts=True)
        self._counts.reshape(-1)[counter] += found.astype(np.uint32)

    def quantiles(self, groups: Sequence[int], levels: Float[np.ndarray, " level"]) -> Float[np.ndarray, " level"]:
        """Quantiles of the values of several groups together; NaN where there are none."""
        edges = _edges()
        return _quantiles(self._total(groups), np.concatenate([-edges[:0:-1], edges]), levels)

    def magnitude_quantiles(self, groups: Sequence[int], levels: Float[np.ndarray, " level"]) -> Float[np.ndarray, " level"]:
        """Quantiles of |value|."""
        counts = self._total(groups)
        return _quantiles(counts[_BINS:] + counts[_BINS - 1 :: -1], _edges(), levels)

    def _total(self, groups: Sequence[int]) -> Int[np.ndarray, " bin"]:
        return self._counts[list(groups)].sum(axis=0, dtype=np.int64)


def _quantiles(
    counts: Int[np.ndarray, " bin"], edges: Float[np.ndarray, " edge"], levels: Float[np.ndarray, " level"]
) -> Float[np.ndarray, " level"]:
    """numpy's default (linear) quantiles, the values of a bin taken to lie evenly in it."""
    up_to = counts.cumsum()
    n = int(up_to[-1])
    if n == 0:
        return np.full(len(levels), np.nan)

    def ranked(rank: Int[np.ndarray, " level"]) -> Float[np.ndarray, " level"]:
        bins = np.searchsorted(up_to, rank, side="right")
        share = (rank - (up_to[bins] - counts[bins]) + 0.5) / counts[bins]
        return edges[bins] + share * (edges[bins + 1] - edges[bins])

    at = levels * (n - 1)
    below = np.floor(at).astype(np.int64)
    low, high = ranked(below), ranked(np.minimum(below + 1, n - 1))
    return low + (at - below) * (high - low)
