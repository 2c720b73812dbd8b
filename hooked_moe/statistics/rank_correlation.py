"""Spearman's rank correlation within positions, over the k experts that are active there."""

import numpy as np
from jaxtyping import Float, Num


def within_position_ranks(values: Num[np.ndarray, "position slot"]) -> Float[np.ndarray, "position slot"]:
    """Ranks within each row less their mean (k + 1) / 2; equals share their average rank. A row with NaN is NaN.

    By counting who is below whom: k is small, and k passes over the table are faster than sorting each row.
    """
    table = np.asarray(values)
    twice = np.zeros(table.shape)
    for slot in range(table.shape[1]):
        other = table[:, slot : slot + 1]
        twice += other < table
        twice -= other > table
    twice[np.isnan(table).any(axis=1)] = np.nan
    return twice / 2


def within_position_spearman(
    score: Num[np.ndarray, "position slot"], delta: Num[np.ndarray, "position slot"]
) -> Float[np.ndarray, " position"]:
    """Spearman's correlation of two scores at each position; NaN where either is constant or holds a NaN."""
    if score.shape != delta.shape:
        raise ValueError(f"score and delta must have one shape, got {score.shape} and {delta.shape}")
    return spearman_of_ranks(within_position_ranks(score), within_position_ranks(delta))


def spearman_of_ranks(
    a: Float[np.ndarray, "position slot"], b: Float[np.ndarray, "position slot"]
) -> Float[np.ndarray, " position"]:
    """The same from `within_position_ranks` of both, for when one side is compared with many."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("ps,ps->p", a, b) / np.sqrt(np.einsum("ps,ps->p", a, a) * np.einsum("ps,ps->p", b, b))
