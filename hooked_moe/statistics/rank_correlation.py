"""Spearman's rank correlation within positions, over the k experts that are active there."""

import numpy as np
from jaxtyping import Float, Int, Num


def twice_centred_ranks(values: Num[np.ndarray, "slot position"]) -> Int[np.ndarray, "slot position"]:
    """Twice the rank of each slot within its position, less the mean (k + 1): whole numbers, also where equals share a rank.

    By comparing all pairs of slots: k is small, and k (k - 1) / 2 passes over contiguous rows are faster than sorting each
    position. NaN counts as equal to everything; see `within_position_ranks`.
    """
    slots = len(values)
    twice = np.zeros(values.shape, np.int8 if slots < 64 else np.int16)
    for slot in range(slots):
        for other in range(slot):
            difference = (values[slot] > values[other]).view(np.int8) - (values[slot] < values[other]).view(np.int8)
            twice[slot] += difference
            twice[other] -= difference
    return twice


def correlation_of_ranks(
    a: Int[np.ndarray, "slot position"], b: Int[np.ndarray, "slot position"]
) -> Float[np.ndarray, " position"]:
    """Spearman's correlation at each position from `twice_centred_ranks` of both; NaN where either is constant."""
    product, square_a, square_b = (np.zeros(a.shape[1], np.int32) for _ in range(3))
    for one, other in zip(a, b, strict=True):
        wide, also_wide = one.astype(np.int32), other.astype(np.int32)
        product += wide * also_wide
        square_a += wide * wide
        square_b += also_wide * also_wide
    with np.errstate(invalid="ignore", divide="ignore"):
        return product / np.sqrt(square_a.astype(np.float64) * square_b)


def within_position_ranks(values: Num[np.ndarray, "position slot"]) -> Float[np.ndarray, "position slot"]:
    """Ranks within each row less their mean (k + 1) / 2; equals share their average rank. A row with NaN is NaN."""
    table = np.ascontiguousarray(np.asarray(values).T)
    ranks = twice_centred_ranks(table) / 2
    ranks[:, np.isnan(table).any(axis=0)] = np.nan
    return ranks.T


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
