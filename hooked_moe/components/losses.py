"""Next-token losses."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos-1"]:
    """`-log p(tokens[t+1] | tokens[<=t])` in nats, in float32 or wider; nan where t or t+1 is padding."""
    losses = F.cross_entropy(at_least_float32(logits[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view(tokens.shape[0], -1)
    if attention_mask is not None:
        real = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
        losses = losses.masked_fill(~real, float("nan"))
    return losses


def loss_of(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
    per_token: bool,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
    """The mean of `next_token_loss` over all real next tokens, or all of it. Raises `ValueError` where there is none to take."""
    if tokens.shape[1] < 2:
        raise ValueError("a next-token loss needs at least two tokens a row, not one")
    losses = next_token_loss(logits, tokens, attention_mask)
    if per_token:
        return losses
    mean = losses.nanmean()
    if attention_mask is not None and bool(mean.isnan()):
        raise ValueError("there is no loss: attention_mask leaves no two neighbouring tokens in any row")
    return mean
