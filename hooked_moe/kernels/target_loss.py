"""The loss at given targets without the logits of all tokens in memory."""

from __future__ import annotations

from collections.abc import Iterable
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
VOCABULARY_TILE = 4096
"""Tokens of a large vocabulary whose logits a CPU makes together."""


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


def cross_entropy(
    logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"], change: Float[Tensor, "n d_vocab"] | None = None
) -> LossAndLogSum:
    """The loss of each row of `logits`, or of `logits + change`, as few rows at a time as the cache of a CPU holds."""
    if change is None and _by_tiles(logits):
        return _loss_by_tiles((logits[:, tile] for tile in _tiles(logits)), targets)
    rows = max(1, CACHE_BYTES // (logits.shape[1] * logits.itemsize)) if logits.device.type == "cpu" else max(1, len(logits))
    changes = [None] * -(-len(logits) // rows) if change is None else change.split(rows)
    parts = zip(logits.split(rows), changes, targets.split(rows), strict=True)
    losses, target_logits = [], []
    for base, shift, part_targets in parts:
        summed = base if shift is None else base + shift
        losses.append(F.cross_entropy(summed, part_targets, reduction="none"))
        target_logits.append(summed.gather(1, part_targets.unsqueeze(1)).squeeze(1))
    if not losses:
        return LossAndLogSum(logits.new_empty(0), logits.new_empty(0, dtype=torch.float64))
    loss = torch.cat(losses)
    return LossAndLogSum(loss, loss.double() + torch.cat(target_logits).double())


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


def shifted_target_loss(
    logits: Float[Tensor, "n d_vocab"],
    shifts: Float[Tensor, "variant n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    targets: Int[Tensor, " n"],
) -> LossAndLogSum:
    """`-log softmax(logits + weight @ shift)[target]` in nats, and the log of the sum, [variant, n], for several shifts of the
    same rows.

    The product is in the weights' dtype, the sum and the loss in that of `logits`: where weights are in half precision, only the
    shift is rounded, by one part in 2^9 of itself (bfloat16), never the logits that it is added to.
    """
    if _by_tiles(logits) and shifts.numel():
        rows, shape = shifts.flatten(0, 1).to(weight.dtype), shifts.shape[:2]
        changes = (F.linear(rows, weight[tile]).to(logits.dtype).unflatten(0, shape) for tile in _tiles(logits))
        return _loss_by_tiles((logits[:, tile] + change for tile, change in zip(_tiles(logits), changes, strict=True)), targets)
    changed = [cross_entropy(logits, targets, change=F.linear(shift.to(weight.dtype), weight)) for shift in shifts]
    if not changed:
        return LossAndLogSum(logits.new_empty(0, len(targets)), logits.new_empty(0, len(targets), dtype=torch.float64))
    losses, log_sums = zip(*changed, strict=True)
    return LossAndLogSum(torch.stack(losses), torch.stack(log_sums))


def _by_tiles(logits: Float[Tensor, "n d_vocab"]) -> bool:
    """Whether losses are made of a large vocabulary's tiles: on a CPU, which then reads a large unembedding once for many rows,
    and sums the logits of a tile while they are in its cache."""
    return logits.device.type == "cpu" and logits.shape[1] > 2 * VOCABULARY_TILE


def _tiles(logits: Float[Tensor, "n d_vocab"]) -> list[slice]:
    return [slice(start, start + VOCABULARY_TILE) for start in range(0, logits.shape[1], VOCABULARY_TILE)]


def _loss_by_tiles(tiles: Iterable[Float[Tensor, "*variant n tile"]], targets: Int[Tensor, " n"]) -> LossAndLogSum:
    """The loss from logits that come a tile at a time."""
    log_sums, own = [], []
    row = torch.arange(len(targets), device=targets.device)
    for number, logits in enumerate(tiles):
        log_sums.append(logits.logsumexp(-1))
        place = targets - number * VOCABULARY_TILE
        elsewhere = (place < 0) | (place >= logits.shape[-1])
        own.append(logits[..., row, place.masked_fill(elsewhere, 0)].masked_fill(elsewhere, 0.0))
    target_logits = torch.stack(own).sum(0)  # each is in one tile, and zero in the others
    log_sum = torch.stack(log_sums).double().logsumexp(0)
    return LossAndLogSum((log_sum - target_logits.double()).to(target_logits.dtype), log_sum)


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
