"""What final residual streams predict: the loss of the next token, and how far the prediction moved.

A shift of the normalised stream moves the log of the sum of exponentials by `S = log sum_v p_v exp(W_U[v] . shift)`, with p the
clean run's prediction. The loss moves by `S - W_U[target] . shift`; and `KL(clean || changed)`, which is the expectation of that
over next tokens drawn from the clean run, is `S - m . shift` with their mean row of the unembedding, `m = sum_v p_v W_U[v]`. So
it costs a sum over d_model beside the loss.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.target_loss import (
    cross_entropy,
    log_sum_change,
    log_total,
    rows_per_chunk,
    target_loss,
    target_loss_and_log_sum,
)
from hooked_moe.transformer import Transformer

ROWS_TOGETHER = 1024
"""Final residual streams that a CPU compares with the clean run's at a time."""


def rows_together(device: torch.device) -> int:
    """Final residual streams that are compared with the clean run's at a time."""
    return ROWS_TOGETHER if device.type == "cpu" else chunk_size_on(device)


class PredictionChange(NamedTuple):
    """What becomes of the prediction at each token, in nats; nan where there is no next token."""

    losses: Float[Tensor, "variant batch pos"]
    kl: Float[Tensor, "variant batch pos"]
    """`KL(clean || changed)`, which rounding may put below zero."""


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


def prediction_change(
    model: Transformer,
    variants: Float[Tensor, "variant batch pos d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    targets: Int[Tensor, "batch pos"],
    products: torch.dtype | None = None,
) -> PredictionChange:
    """Losses and KL divergences of many variants of the same tokens, whose change is unembedded in the dtype `products`; None: in
    the weights' own if that is bfloat16, else in float32."""
    wide = torch.promote_types(variants.dtype, torch.float32)
    losses, kl = (variants.new_full(variants.shape[:-1], float("nan"), dtype=wide) for _ in range(2))
    row, position = _measured(targets)
    if variants.numel() and len(row):
        chunk = rows_per_chunk(model.unembed.W_U, torch.float32)
        narrow = None if products is None else model.unembed.W_U.to(products)
        for rows, positions in zip(row.split(chunk), position.split(chunk), strict=True):
            prediction = CleanPrediction(model, clean[rows, positions], targets[rows, positions].clamp(min=0), narrow)
            per_group = max(1, rows_together(variants.device) // len(rows))
            for start in range(0, len(variants), per_group):  # not all in float32 at a time
                group = slice(start, start + per_group)
                losses[group, rows, positions], kl[group, rows, positions] = prediction.changed_to(
                    variants[group, rows, positions]
                )
    nowhere = targets < 0
    return PredictionChange(losses.masked_fill(nowhere, float("nan")), kl.masked_fill(nowhere, float("nan")))


class CleanPrediction:
    """The clean run's prediction at some tokens, for changed ones to be compared with.

    The clean run alone is unembedded. Of each variant, the change of its normalised stream is: so no rounding of logits that both
    have in common comes into the difference. In bfloat16 the change is unembedded in the weights' own dtype, which rounds the
    change of a logit by one part in 2^9 of itself and not the logit. Where a kernel reads the loss without the logits in memory,
    both are unembedded by it. `narrow` is the unembedding of changes in a narrower dtype than the model's, if it has one.
    """

    def __init__(
        self,
        model: Transformer,
        resid: Float[Tensor, "n d_model"],
        targets: Int[Tensor, " n"],
        narrow: Float[Tensor, "d_vocab d_model"] | None = None,
    ) -> None:
        unembedding = model.unembed.W_U
        wide = at_least_float32(unembedding)
        self.model, self.targets = model, targets
        if narrow is None and unembedding.dtype == torch.bfloat16:
            narrow = unembedding
        self.fused = use_kernels(unembedding) and narrow is None
        self.weight = unembedding if self.fused else wide if narrow is None else narrow
        self.x = model.ln_final(at_least_float32(resid))
        logits = F.linear(self.x, wide)
        if self.fused:
            self.mean_row = logits.softmax(-1) @ wide
            del logits
            self.log_sum = target_loss_and_log_sum(self.x, self.weight, targets).log_sum.double()
            return
        self.loss = cross_entropy(logits, targets).loss
        self.log_p = logits.log_softmax(-1)
        del logits
        self.mean_row = self.log_p.exp() @ wide
        self.target_row = wide[targets]
        self.log_total = log_total(self.log_p)

    def of_first(self, n: int) -> CleanPrediction:
        """The same at the first `n` of its tokens."""
        part = copy(self)
        for name, values in vars(self).items():
            if name not in ("model", "fused", "weight"):
                setattr(part, name, values[:n])
        return part

    def changed_to(
        self, resid: Float[Tensor, "variant n d_model"]
    ) -> tuple[Float[Tensor, "variant n"], Float[Tensor, "variant n"]]:
        """Losses and KL divergences of the predictions from other final residual streams."""
        x = self.model.ln_final(at_least_float32(resid))
        shift = x - self.x
        if self.fused:
            at_all = target_loss_and_log_sum(x.flatten(0, 1), self.weight, self.targets.repeat(len(x)))
            loss, log_sum = (values.view(x.shape[:2]) for values in at_all)
            moved = log_sum.double() - self.log_sum
        else:
            shift = shift.to(self.weight.dtype)  # as it is unembedded
            moved = log_sum_change(self.log_p, shift, self.weight) - self.log_total
            loss = (self.loss + moved - _along(shift, self.target_row)).to(self.loss.dtype)
        return loss, (moved - _along(shift, self.mean_row)).to(loss.dtype)


def _along(shift: Float[Tensor, "variant n d_model"], row: Float[Tensor, "n d_model"]) -> Float[Tensor, "variant n"]:
    """The products with a row of each token, in float64."""
    return (shift * row).sum(-1, dtype=torch.float64)


def _measured(targets: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and position of every token with a target; on a GPU of every token, for the others are found by waiting for it."""
    if targets.device.type == "cpu":
        row, position = (targets >= 0).nonzero(as_tuple=True)
        return row, position
    index = torch.arange(targets.numel(), device=targets.device)
    return index // targets.shape[1], index % targets.shape[1]
