"""The experts' MLPs on a CPU, one expert after another: what one of them reads and makes stays in the cache.

Made in one go (`expert_mlp`) or stage by stage, for hooks to look in between: the operations on every block of rows are the same,
on memory that is aligned alike, and so is every bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.config import ClampedSwiGLU
from hooked_moe.kernels.cpu import few_rows
from hooked_moe.kernels.cpu.alignment import begins_aligned
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.dispatch import use_reference
from hooked_moe.kernels.swiglu import swiglu

ROW_MULTIPLE = 32
"""Half-precision products of more than half as many rows have a multiple of it: oneDNN compiles one for every number of rows
that it meets, in the time of several products."""

Blocks = list[tuple[int, slice]]
"""Each expert that serves tokens, and its rows. Where they are more than it serves, the next expert's overwrite the rest: blocks
must be computed in order, into a tensor with `ROW_MULTIPLE` rows more."""


MIN_FLOPS_PER_EXPERT = 5e6
"""Floating-point operations of an average expert from which on the calls for each cost less than they spare."""


def runs_by_block(rows: int, W_out: Float[Tensor, "expert d_model d_expert"], x: Tensor, *others: Tensor) -> bool:
    """Whether experts run one after another: on a CPU, with enough to do or with weights to widen, where no gradient is wanted
    and products are in the tensors' dtype."""
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (W_out, x, *others))
    enough = W_out.dtype != x.dtype or 6 * rows * W_out.numel() >= MIN_FLOPS_PER_EXPERT * len(W_out) ** 2
    plain = W_out.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return enough and plain and not needs_gradient and not use_reference()


def blocks_of(ends: Sequence[int], dtype: torch.dtype) -> Blocks:
    """`ends[e]` is where the rows of expert e end, of rows sorted by expert."""
    blocks, start = [], 0
    for expert, end in enumerate(ends):
        if end > start:
            rows = end - start
            if dtype.itemsize < 4 and rows > ROW_MULTIPLE // 2:
                rows += -rows % ROW_MULTIPLE
            blocks.append((expert, slice(start, start + rows)))
            start = end
    return blocks


def expert_mlp(
    x: Float[Tensor, "token d_model"],
    token: Int[Tensor, " n"],
    W_in: Float[Tensor, "expert gate_and_up d_model"],
    W_out: Float[Tensor, "expert d_model d_expert"],
    blocks: Blocks,
    scratch: Scratch | None = None,
    b_in: Float[Tensor, "expert gate_and_up"] | None = None,
    b_out: Float[Tensor, "expert d_model"] | None = None,
    clamp: ClampedSwiGLU | None = None,
) -> Float[Tensor, "n d_model"]:
    """`out[r] = W_out[e] @ swiglu(W_in[e] @ x[token[r]] + b_in[e]) + b_out[e]` for the rows r of every expert e; in `scratch`,
    where it is given."""
    out = (scratch or Scratch()).matrix(len(token) + ROW_MULTIPLE, W_out.shape[1], like=x)
    token = F.pad(token, (0, ROW_MULTIPLE))
    to_hidden, to_out = W_in.unbind(0), W_out.unbind(0)
    for expert, rows in blocks:
        pre = few_rows.product(x.index_select(0, token[rows]), to_hidden[expert].to(x.dtype))  # may be stored in a narrower one
        post = swiglu(pre if b_in is None else pre + b_in[expert], clamp)
        _multiply(post, to_out[expert], out[rows])
        if b_out is not None:
            out[rows] += b_out[expert]
    return out[: len(out) - ROW_MULTIPLE]


def product_by_block(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], blocks: Blocks
) -> Float[Tensor, "n d_out"]:
    """`out[r] = weight[e] @ x[r]` for the rows r of every expert e."""
    out, weights = x.new_empty(len(x) + ROW_MULTIPLE, weight.shape[1]), weight.unbind(0)
    for expert, rows in blocks:
        _multiply(_rows_of(x, rows), weights[expert], out[rows])
    return out[: len(x)]


def swiglu_by_block(
    gate_and_up: Float[Tensor, "n gate_and_up"], blocks: Blocks, clamp: ClampedSwiGLU | None = None
) -> Float[Tensor, "n d_expert"]:
    """`swiglu` of every row. Torch's silu has a last bit that depends on how many rows there are."""
    out = gate_and_up.new_empty(len(gate_and_up) + ROW_MULTIPLE, gate_and_up.shape[1] // 2)
    for _, rows in blocks:
        out[rows] = swiglu(_rows_of(gate_and_up, rows), clamp)
    return out[: len(gate_and_up)]


def _rows_of(x: Float[Tensor, "n width"], rows: slice) -> Float[Tensor, "block width"]:
    """With rows of zeros where `x` has no more."""
    missing = rows.stop - len(x)
    return x[rows] if missing <= 0 else F.pad(x[rows], (0, 0, 0, missing))


def _multiply(x: Float[Tensor, "block d_in"], weight: Float[Tensor, "d_out d_in"], out: Float[Tensor, "block d_out"]) -> None:
    """`out = x @ weight.T`, in the dtype of x, rounded alike wherever in their matrices the two blocks begin."""
    weight = weight.to(x.dtype)
    x = x if begins_aligned(x) else x.clone()
    if begins_aligned(out) and not few_rows.are_few(len(x), x, weight):
        torch.mm(x, weight.T, out=out)
    else:
        out.copy_(few_rows.product(x, weight))
