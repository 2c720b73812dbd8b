"""Shares of players in what they achieve together, from the value of every coalition."""

from __future__ import annotations

from math import comb

import numpy as np
from jaxtyping import Float

from hooked_moe.statistics.samples import require_finite


def shapley_values(value: Float[np.ndarray, "coalition *rest"]) -> Float[np.ndarray, "player *rest"]:
    """The mean over all orders of the players of what each adds when it joins (Shapley 1953).

    Entry c of `value` is the value of the coalition of those players whose bit is set in c. The shares sum to the value of all
    players less that of none. Exact: 2^players values. Raises `ValueError` for a number of values that is no power of two.

    >>> shapley_values(np.array([0.0, 1.0, 2.0, 5.0]))
    array([2., 3.])
    """
    n, gains = _gains(value)
    size = _sizes(n)
    weight = np.array([1 / (n * comb(n - 1, s)) for s in range(n)])
    return np.stack([np.tensordot(weight[size[without]], gain, axes=1) for without, gain in gains])


def banzhaf_values(value: Float[np.ndarray, "coalition *rest"]) -> Float[np.ndarray, "player *rest"]:
    """The mean over all coalitions of the others of what each player adds (Banzhaf 1965); these need not sum to the whole.

    Raises `ValueError` for a number of values that is no power of two.
    """
    _, gains = _gains(value)
    return np.stack([gain.mean(axis=0) for _, gain in gains])


def _gains(value: np.ndarray) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """For each player, the coalitions without it and what it adds to each."""
    values = np.asarray(value, np.float64)
    require_finite("value", values)
    n = len(values).bit_length() - 1
    if n < 1 or len(values) != 1 << n:
        raise ValueError(f"{len(values)} values are not those of all coalitions: expected 2, 4, 8, ...")
    coalitions = np.arange(1 << n)
    without = [coalitions[(coalitions >> player & 1) == 0] for player in range(n)]
    return n, [(others, values[others | 1 << player] - values[others]) for player, others in enumerate(without)]


def _sizes(n: int) -> np.ndarray:
    return np.array([coalition.bit_count() for coalition in range(1 << n)])
