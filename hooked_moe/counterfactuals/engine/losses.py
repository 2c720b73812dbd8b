"""Losses of final residual streams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.target_loss import rows_per_chunk, shifted_target_loss, target_loss
from hooked_moe.transformer import Transformer


def loss_at(
    model: Transformer, resid: Float[Tensor, "variant batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "variant batch pos"]:
    """Loss of final residual streams at their targets; nan where the target is -1."""
    weight = model.unembed.W_U
    if use_kernels(weight):  # at all positions: to pick those with a target, the device would have to be waited for
        variants = max(1, chunk_size_on(resid.device) // targets.numel())
        normalised = (model.ln_final(at_least_float32(chunk)).flatten(0, 2) for chunk in resid.split(variants))
        parts = [target_loss(x, weight, targets.flatten().repeat(len(x) // targets.numel())) for x in normalised]
        return torch.cat(parts).view(resid.shape[:-1])
    losses = resid.new_full(resid.shape[:-1], float("nan"), dtype=torch.promote_types(resid.dtype, torch.float32))
    real = targets >= 0
    real_targets, wide = targets[real], at_least_float32(weight)
    for variant, loss in zip(resid, losses, strict=True):  # a variant at a time bounds the float32 copies
        loss[real] = target_loss(model.ln_final(at_least_float32(variant[real])), wide, real_targets)
    return losses


def variant_losses(
    model: Transformer,
    variants: Float[Tensor, "variant batch pos d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    targets: Int[Tensor, "batch pos"],
) -> Float[Tensor, "variant batch pos"]:
    """`loss_at` of many variants of the same tokens.

    In bfloat16 the clean run alone is unembedded in float32; of each variant, the change of its normalised stream is, in the
    weights' own dtype, which rounds the change of a logit by one part in 2^9 of itself and not the logit.
    """
    weight = model.unembed.W_U
    if weight.dtype != torch.bfloat16:
        return loss_at(model, variants, targets)
    losses = variants.new_full(variants.shape[:-1], float("nan"), dtype=torch.float32)
    rows, positions = (index.split(rows_per_chunk(weight, torch.float32)) for index in _measured(targets))
    wide = weight.float()
    for row, position in zip(rows, positions, strict=True):
        start = model.ln_final(clean[row, position].float())
        shifts = (model.ln_final(variant[row, position].float()) - start for variant in variants)  # one at a time in memory
        logits, real_targets = F.linear(start, wide), targets[row, position].clamp(min=0)
        losses[:, row, position] = shifted_target_loss(logits, shifts, weight, real_targets)
    return losses.masked_fill(targets < 0, float("nan"))


def _measured(targets: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and position of every token with a target; on a GPU of every token, for the others are found by waiting for it."""
    if targets.device.type == "cpu":
        row, position = (targets >= 0).nonzero(as_tuple=True)
        return row, position
    index = torch.arange(targets.numel(), device=targets.device)
    return index // targets.shape[1], index % targets.shape[1]
