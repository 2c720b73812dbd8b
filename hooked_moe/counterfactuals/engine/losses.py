"""What final residual streams predict: the loss of the next token, and how far the prediction moved.

`KL(clean || changed)` is the expectation of the change of the loss over next tokens drawn from the clean run. With the log of the
sum of exponentials `lse`, the normalised stream `x` and the clean run's mean row of the unembedding, `m = sum_v p_v W_U[v]`,

    KL = lse(changed) - lse(clean) - m . (x(changed) - x(clean))

so it costs a sum over d_model beside the loss. All of it are differences, taken in float64 of float32 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.kernels.dispatch import by_operator
from hooked_moe.kernels.target_loss import expected_row, rows_at_once, shifted_target_loss, target_loss, target_loss_and_log_sum
from hooked_moe.transformer import Transformer


class PredictionChange(NamedTuple):
    """What becomes of the prediction at each token, in nats; nan where there is no next token."""

    losses: Float[Tensor, "variant batch pos"]
    kl: Float[Tensor, "variant batch pos"]
    """`KL(clean || changed)`, which rounding may put below zero."""


@dataclass(frozen=True)
class CleanPrediction:
    """The clean run's prediction at some tokens."""

    x: Float[Tensor, "n d_model"]
    """Residual streams after the final norm."""
    log_sum: Float[Tensor, " n"]
    mean_row: Float[Tensor, "n d_model"]
    """The mean row of the unembedding under the prediction."""

    def __getitem__(self, tokens: Int[Tensor, " m"]) -> CleanPrediction:
        """The same at some of the tokens."""
        return CleanPrediction(self.x[tokens], self.log_sum[tokens], self.mean_row[tokens])

    def kl(self, shift: Float[Tensor, "*variant n d_model"], log_sum: Float[Tensor, "*variant n"]) -> Float[Tensor, "*variant n"]:
        """From it to predictions whose `x` is shifted and whose log of the sum is `log_sum`."""
        along_mean = (shift.to(self.mean_row.dtype) * self.mean_row).sum(-1, dtype=torch.float64)
        return log_sum.double() - self.log_sum.double() - along_mean


def clean_prediction(model: Transformer, resid: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]) -> CleanPrediction:
    """The prediction from final residual streams."""
    x, unembedding = model.ln_final(at_least_float32(resid)), model.unembed.W_U
    weight = unembedding if by_operator(unembedding) else at_least_float32(unembedding)
    return CleanPrediction(x, target_loss_and_log_sum(x, weight, targets).log_sum, expected_row(x, weight))


def loss_at(
    model: Transformer, resid: Float[Tensor, "variant batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "variant batch pos"]:
    """Loss of final residual streams at their targets; nan where the target is -1."""
    weight = model.unembed.W_U
    if by_operator(weight):  # at all positions: to pick those with a target, the device would have to be waited for
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


def prediction_change(
    model: Transformer,
    variants: Float[Tensor, "variant batch pos d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    targets: Int[Tensor, "batch pos"],
) -> PredictionChange:
    """Losses and KL divergences of many variants of the same tokens.

    In bfloat16 the clean run alone is unembedded in float32; of each variant, the change of its normalised stream is, in the
    weights' own dtype, which rounds the change of a logit by one part in 2^9 of itself and not the logit.
    """
    wide = torch.promote_types(variants.dtype, torch.float32)
    losses, kl = (variants.new_full(variants.shape[:-1], float("nan"), dtype=wide) for _ in range(2))
    weight, (row, position) = model.unembed.W_U, _measured(targets)
    if variants.numel() and len(row):
        rows_per_chunk = rows_at_once(weight, torch.float32) if weight.dtype == torch.bfloat16 else len(row)
        for rows, positions in zip(row.split(rows_per_chunk), position.split(rows_per_chunk), strict=True):
            there = targets[rows, positions].clamp(min=0)
            per_group = 1 if variants.device.type == "cpu" else max(1, chunk_size_on(variants.device) // len(rows))
            streams = (group[:, rows, positions] for group in variants.split(per_group))  # not all in float32 at a time
            change = change_from(clean_prediction(model, clean[rows, positions], there), model, streams, there)
            losses[:, rows, positions], kl[:, rows, positions] = (values.to(wide) for values in change)
    nowhere = targets < 0
    return PredictionChange(losses.masked_fill(nowhere, float("nan")), kl.masked_fill(nowhere, float("nan")))


def change_from(
    prediction: CleanPrediction,
    model: Transformer,
    groups: Iterable[Float[Tensor, "_variant n d_model"]],
    targets: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "variant n"], Float[Tensor, "variant n"]]:
    """Losses and KL divergences of final residual streams of the same n tokens, a group of variants at a time."""
    unembedding = model.unembed.W_U
    by_shift = unembedding.dtype == torch.bfloat16
    logits = F.linear(prediction.x, unembedding.float()) if by_shift else None
    weight = unembedding if by_shift or by_operator(unembedding) else at_least_float32(unembedding)
    losses, divergences = [], []
    for group in groups:
        x = model.ln_final(at_least_float32(group))
        if logits is None:
            loss, log_sum = target_loss_and_log_sum(x.flatten(0, 1), weight, targets.repeat(len(x)))
            shift = x - prediction.x
        else:
            shift = (x - prediction.x).to(weight.dtype)
            loss, log_sum = shifted_target_loss(logits, shift, weight, targets)
        losses.append(loss.view(x.shape[:2]))
        divergences.append(prediction.kl(shift, log_sum.view(x.shape[:2])))
    return torch.cat(losses), torch.cat(divergences)


def _measured(targets: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and position of every token with a target; on a GPU of every token, for the others are found by waiting for it."""
    if targets.device.type == "cpu":
        row, position = (targets >= 0).nonzero(as_tuple=True)
        return row, position
    index = torch.arange(targets.numel(), device=targets.device)
    return index // targets.shape[1], index % targets.shape[1]
