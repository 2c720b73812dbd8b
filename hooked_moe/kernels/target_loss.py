"""The loss at given targets without the logits of all tokens in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 2 << 20  # logits of one chunk: small enough for the cache


def rows_at_once(weight: Float[Tensor, "d_vocab d_model"], dtype: torch.dtype) -> int:
    """How many rows of logits in `dtype` make a chunk."""
    return max(64, CHUNK_BYTES // (len(weight) * dtype.itemsize))


def target_loss(
    x: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_vocab d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """`-log softmax(weight @ x)[target]` in nats for every row, a chunk of rows at a time."""
    losses = torch.empty(len(x), dtype=x.dtype, device=x.device)
    rows = rows_at_once(weight, x.dtype)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        losses[part] = F.cross_entropy(F.linear(x[part], weight), targets[part], reduction="none")
    return losses


def shifted_target_loss(
    logits: Float[Tensor, "n d_vocab"],
    shifts: Iterable[Float[Tensor, "n d_model"]],
    weight: Float[Tensor, "d_vocab d_model"],
    targets: Int[Tensor, " n"],
) -> Float[Tensor, "variant n"]:
    """`-log softmax(logits + weight @ shift)[target]` in nats, for several shifts of the same rows.

    The product is in the weights' dtype, the sum and the loss in that of `logits`: where weights are in half precision, only the
    shift is rounded, by one part in 2^9 of itself (bfloat16), never the logits that it is added to.
    """
    losses = [F.cross_entropy(logits + F.linear(one.to(weight.dtype), weight), targets, reduction="none") for one in shifts]
    return torch.stack(losses) if losses else logits.new_empty(0, len(targets))
