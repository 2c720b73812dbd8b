"""Batched per-token expert masking: many masked sums of the same expert outputs."""

from __future__ import annotations

from einops import einsum
from jaxtyping import Float
from torch import Tensor


def masked_combine(
    resid: Float[Tensor, "batch pos d_model"],
    outputs: Float[Tensor, "batch pos slot d_model"],
    weights: Float[Tensor, "variant batch pos slot"],
) -> Float[Tensor, "variant batch pos d_model"]:
    """`resid + sum over slots of weights[variant] * outputs`: the block's output under each variant's routing weights."""
    return resid + einsum(
        outputs, weights, "batch pos slot d_model, variant batch pos slot -> variant batch pos d_model"
    )
