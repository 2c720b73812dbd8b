"""The loss at given targets without the logits of all tokens in memory."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator

CACHE_BYTES = 1 << 20
"""Bytes of logits that a CPU takes through the softmax together."""
LEAST_SUM = 1e-30
"""Of exponentials in float32 that are summed as they are."""


def vocabulary_tile(device: torch.device) -> int:
    """Tokens of the vocabulary whose logits change together: on a CPU as many as its cache holds for a thousand rows."""
    return 512 if device.type == "cpu" else 4096


def chunk_bytes(device: torch.device) -> int:
    """Logits of one product: on a CPU fewer than the 32 MiB that glibc gives back to the system whenever they are free."""
    return (24 if device.type == "cpu" else 256) << 20


def rows_per_chunk(weight: Float[Tensor, "d_vocab d_model"], dtype: torch.dtype) -> int:
    """How many rows of logits in `dtype` make a chunk."""
    return max(64, chunk_bytes(weight.device) // (len(weight) * dtype.itemsize))


class LossAndLogSum(NamedTuple):
    loss: Float[Tensor, "*rows"]
    """`-log softmax(logits)[target]` in nats."""
    log_sum: Float[Tensor, "*rows"]
    """`log sum exp(logits)`, in float64 where it is a sum of the loss and the logit of its target, which were rounded before."""


def cross_entropy(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]) -> LossAndLogSum:
    """The loss of each row of `logits`, as few rows at a time as the cache of a CPU holds."""
    rows = max(1, CACHE_BYTES // (logits.shape[1] * logits.itemsize)) if logits.device.type == "cpu" else max(1, len(logits))
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    loss = torch.cat([F.cross_entropy(part, part_targets, reduction="none") for part, part_targets in parts])
    return LossAndLogSum(loss, loss.double() + logits.gather(1, targets.unsqueeze(1)).squeeze(1).double())


def target_loss(
    x: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_vocab d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """`-log softmax(weight @ x)[target]` in nats for every row, a chunk of rows at a time.

    Where operators run, `weight` may be narrower than `x`, and a target of -1 has the loss nan.
    """
    return target_loss_and_log_sum(x, weight, targets).loss


def target_loss_and_log_sum(
    x: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_vocab d_model"], targets: Int[Tensor, " n"]
) -> LossAndLogSum:
    """`target_loss`, and the logarithm of the sum that it divides by."""
    if use_kernels(weight):
        return LossAndLogSum(*_target_loss(x, weight, targets))
    losses = torch.empty(len(x), dtype=x.dtype, device=x.device)
    log_sums = torch.empty(len(x), dtype=torch.float64, device=x.device)
    rows = rows_per_chunk(weight, x.dtype)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        losses[part], log_sums[part] = cross_entropy(F.linear(x[part], weight), targets[part])
    return LossAndLogSum(losses, log_sums)


def log_sum_change(
    log_p: Float[Tensor, "n d_vocab"], shifts: Float[Tensor, "variant n d_model"], weight: Float[Tensor, "d_vocab d_model"]
) -> Float[Tensor, "variant n"]:
    """`log sum_v p_v exp(weight_v . shift)`, in float64: by how much the log of the sum of exponentials moves when the logits, of
    which `log_p` is the log-softmax, move with each of several shifts of the same rows. Exponentials are in the dtype of `log_p`.

    The product is in the weights' dtype: where they are in half precision, only the change of a logit is rounded, by one part in
    2^9 of itself (bfloat16), never the logit. A shift of zero has the bits of `log_total(log_p)`.
    """
    flat, shape = shifts.to(weight.dtype).flatten(0, 1), shifts.shape[:2]

    def changes(weight: Tensor, rows: Tensor) -> Tensor:
        return F.linear(rows, weight).to(log_p.dtype)

    device = log_p.device
    tiles = (x.split(vocabulary_tile(device), dim) for x, dim in ((weight, 0), (log_p, 1)))
    moved = (changes(rows, flat).unflatten(0, shape).add_(before) for rows, before in zip(*tiles, strict=True))
    log_sum = _log_sum(moved, device)
    if device.type == "cpu":
        for variant, row in (~log_sum.isfinite()).nonzero().tolist():
            log_sum[variant, row] = (log_p[row] + changes(weight, shifts[variant, row].to(weight.dtype))).double().logsumexp(-1)
    return log_sum


def log_total(log_p: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """The log of the sum of all probabilities, which rounding keeps from being zero; in float64."""
    tiles = log_p.split(vocabulary_tile(log_p.device), dim=-1)
    return _log_sum((tile.clone() for tile in tiles), log_p.device)


def _log_sum(tiles: Iterable[Float[Tensor, "*rows tile"]], device: torch.device) -> Float[Tensor, "*rows"]:
    """The log of the sum of exponentials of all tiles, in whose place they are computed. A CPU makes no pass for the largest of a
    row: where the sum leaves the range of float32 it is not finite."""
    if device.type != "cpu":
        return torch.stack([tile.logsumexp(-1) for tile in tiles]).double().logsumexp(0)
    total = reduce(torch.add, (tile.exp_().sum(-1).double() for tile in tiles))
    return total.log().masked_fill(total < LEAST_SUM, -torch.inf)


def as_sum(x: Float[Tensor, "n d_model"], dtype: torch.dtype, parts: int = 2) -> Float[Tensor, "part n d_model"]:
    """Numbers of a narrower type whose sum is `x`, to its last bits: two bfloat16 hold 16 bits of a float32, two float16 22.

    A product of two of the narrower type is exact in float32. So tensor cores that take only these multiply float32.
    """
    summands, rest = [], x
    for _ in range(parts):
        summands.append(rest.to(dtype))
        rest = rest - summands[-1]
    return torch.stack(summands)


# --- the operator ------------------------------------------------------------------------------------------------------------


def target_loss_reference(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: the logits of all rows, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide))
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-1)
    return losses.masked_fill(targets == -1, float("nan")), logits.logsumexp(-1)


def _launch(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    weight, targets = weight.contiguous(), targets.contiguous()
    hidden = x[None].contiguous() if x.dtype == weight.dtype else as_sum(x, weight.dtype)
    (parts, rows, depth), vocabulary = hidden.shape, len(weight)
    span = launches.vocabulary_span(rows=rows, vocabulary=vocabulary, dtype=weight.dtype)
    launch = launches.target_logprob(rows=rows, vocabulary=vocabulary, span=span, parts=parts, dtype=weight.dtype)
    log_sums = x.new_empty(launch.grid[1], rows, dtype=torch.float32)
    target_logits = x.new_full((rows,), float("nan"), dtype=torch.float32)
    nvrtc.run(launch, log_sums, target_logits, hidden, weight, targets, rows, vocabulary, depth, span)
    log_sum = log_sums.logsumexp(0)
    return log_sum - target_logits, log_sum


def _shapes(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=wide)


_target_loss = operator(
    "target_loss",
    "(Tensor x, Tensor weight, Tensor targets) -> (Tensor, Tensor)",
    definition=target_loss_reference,
    launch=_launch,
    shapes=_shapes,
)
