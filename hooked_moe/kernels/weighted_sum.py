"""Weighted sums of expert outputs; with many weightings of the same outputs, batched per-token expert masking."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator


def weighted_sum(
    rows: Float[Tensor, "n d_model"], place: Int[Tensor, "*token slot"], weights: Float[Tensor, "*token slot"]
) -> Float[Tensor, "*token d_model"]:
    """`out[token] = sum over slots j of weights[token, j] * rows[place[token, j]]`, without gathering the rows first.

    Rows are added in the order of the slots, wherever they are: a permutation of `rows` changes no bit.
    """
    slots = place.shape[-1]
    if use_kernels(rows):
        return _masked_combine(rows, place.reshape(-1, slots), weights.reshape(1, -1, slots), None)[0].unflatten(
            0, place.shape[:-1]
        )
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
    base: Float[Tensor, "batch pos d_model"] | None = None,
) -> Float[Tensor, "variant batch pos d_model"]:
    """The weighted sum under each variant's routing weights, added to `base`. On a CUDA device each row is read once for all."""
    if use_kernels(rows):
        shape, slots = weights.shape[:3], place.shape[-1]
        flat = None if base is None else base.flatten(0, 1)
        combined = _masked_combine(rows, place.reshape(-1, slots), weights.reshape(len(weights), -1, slots), flat)
        return combined.unflatten(1, shape[1:])
    combined = weighted_sum(rows, place.expand(weights.shape), weights)
    return combined if base is None else base + combined


# --- the operator ------------------------------------------------------------------------------------------------------------


def masked_combine_reference(
    rows: Float[Tensor, "n d_model"],
    place: Int[Tensor, "token slot"],
    weights: Float[Tensor, "variant token slot"],
    base: Float[Tensor, "token d_model"] | None,
) -> Float[Tensor, "variant token d_model"]:
    """By its definition, in float32 or wider and rounded once, as the kernel does."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    combined = einsum(rows[place].to(wide), weights.to(wide), "token slot d_model, variant token slot -> variant token d_model")
    return (combined if base is None else combined + base).to(rows.dtype).contiguous()


def _launch(rows: Tensor, place: Tensor, weights: Tensor, base: Tensor | None) -> Tensor:
    rows, place, weights = rows.contiguous(), place.contiguous(), weights.contiguous()
    base = None if base is None else base.contiguous()
    variants, tokens, slots = weights.shape
    out = rows.new_empty(variants, tokens, rows.shape[1])
    launch = launches.masked_combine(
        variants=variants,
        tokens=tokens,
        slots=slots,
        width=rows.shape[1],
        dtype=rows.dtype,
        mask=weights.dtype,
        aligned=launches.rows_are_aligned(rows, base, out),
    )
    sizes = variants, tokens, rows.shape[1], weights.stride(0), weights.stride(1)
    nvrtc.run(launch, out, rows, place, None, weights, base, *sizes)
    return out


def _shapes(rows: Tensor, place: Tensor, weights: Tensor, base: Tensor | None) -> Tensor:
    return rows.new_empty(*weights.shape[:2], rows.shape[1])


_masked_combine = operator(
    "masked_combine",
    "(Tensor rows, Tensor place, Tensor weights, Tensor? base) -> Tensor",
    definition=masked_combine_reference,
    launch=_launch,
    shapes=_shapes,
)
