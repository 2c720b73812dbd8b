"""One matrix product per expert over rows sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.dispatch import use_reference

FEW = 4
"""Rows are few where there is at most one for so many experts."""
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], ends: Int[Tensor, " expert"]
) -> Float[Tensor, "n d_out"]:
    """`out[r] = weight[e] @ x[r]` for the rows r of expert e, which are `ends[e-1] <= r < ends[e]`.

    torch's `grouped_mm` takes float32, bfloat16 and float16 whose rows are whole numbers of 16 bytes; the loop takes the rest. On
    a CPU it multiplies for every expert, also for those without rows, which are most of them while tokens are generated.
    """
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type == "cpu" and len(x) * FEW <= len(weight) and not needs_gradient and not use_reference():
        return _of_experts_with_rows(x, weight, ends)
    whole_rows = all(width * x.itemsize % 16 == 0 for width in weight.shape[1:])  # both: one is a row of the gradient
    if x.dtype in _FUSED_DTYPES and whole_rows and len(x) and x.stride(1) == 1 and not use_reference():
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return grouped_matmul_loop(x, weight, ends)


def grouped_matmul_loop(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], ends: Int[Tensor, " expert"]
) -> Float[Tensor, "n d_out"]:
    """The same, one expert after another: the reference."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = x.split(counts)
    # unbind once: indexing a stacked weight expert by expert would make a gradient of the whole stack for each
    return torch.cat([rows_e @ weight_e.T for rows_e, weight_e in zip(rows, weight.unbind(0), strict=True)])


def _of_experts_with_rows(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], ends: Int[Tensor, " expert"]
) -> Float[Tensor, "n d_out"]:
    """The same, bit for bit as torch's, without a product for experts that have no rows."""
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            pieces.append(x[start:end] @ weight[expert].T)
            start = end
    return torch.cat(pieces) if pieces else grouped_matmul_loop(x, weight, ends)
