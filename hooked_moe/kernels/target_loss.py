"""The loss at given targets without the logits of all tokens in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 2 << 20  # logits of one chunk: small enough for the cache


def target_loss(
    x: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_vocab d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """`-log softmax(weight @ x)[target]` in nats for every row, a chunk of rows at a time."""
    rows = max(64, CHUNK_BYTES // (len(weight) * x.element_size()))
    losses = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        losses[part] = F.cross_entropy(F.linear(x[part], weight), targets[part], reduction="none")
    return losses


def as_sum(x: Float[Tensor, "n d_model"], dtype: torch.dtype, parts: int = 2) -> Float[Tensor, "part n d_model"]:
    """Numbers of a narrower type whose sum is `x`, to its last bits: two bfloat16 hold 16 bits of a float32, two float16 22.

    A product of two of the narrower type is exact in float32. So tensor cores that take only these multiply float32.
    """
    summands, rest = [], x
    for _ in range(parts):
        summands.append(rest.to(dtype))
        rest = rest - summands[-1]
    return torch.stack(summands)
