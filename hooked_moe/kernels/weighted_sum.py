"""Weighted sums of expert outputs; with many weightings of the same outputs, batched per-token expert masking."""

from __future__ import annotations

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor


def weighted_sum(
    rows: Float[Tensor, "n d_model"], place: Int[Tensor, "*token slot"], weights: Float[Tensor, "*token slot"]
) -> Float[Tensor, "*token d_model"]:
    """`out[token] = sum over slots j of weights[token, j] * rows[place[token, j]]`, without gathering the rows first.

    Rows are added in the order of the slots, wherever they are: a permutation of `rows` changes no bit.
    """
    slots = place.shape[-1]
    summed = F.embedding_bag(place.reshape(-1, slots), rows, per_sample_weights=weights.reshape(-1, slots), mode="sum")
    return summed.unflatten(0, place.shape[:-1])


def weighted_sum_reference(
    rows: Float[Tensor, "n d_model"], place: Int[Tensor, "*token slot"], weights: Float[Tensor, "*token slot"]
) -> Float[Tensor, "*token d_model"]:
    """The same by its definition."""
    return einsum(rows[place], weights, "... slot d_model, ... slot -> ... d_model")


def masked_combine(
    rows: Float[Tensor, "n d_model"],
    place: Int[Tensor, "batch pos slot"],
    weights: Float[Tensor, "variant batch pos slot"],
) -> Float[Tensor, "variant batch pos d_model"]:
    """The weighted sum under each variant's routing weights."""
    return weighted_sum(rows, place.expand(weights.shape), weights)
