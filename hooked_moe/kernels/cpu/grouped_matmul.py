"""One matrix product per expert over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cpu import few_rows
from hooked_moe.kernels.dispatch import use_reference

_EXPERTS_A_ROW = 4
"""As many of them or more, and most experts have no rows."""
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], ends: Int[Tensor, " expert"]
) -> Float[Tensor, "n d_out"]:
    """`out[r] = weight[e] @ x[r]` for the rows r of expert e, which are `ends[e-1] <= r < ends[e]`.

    torch's `grouped_mm` takes float32, bfloat16 and float16 whose rows are whole numbers of 16 bytes; the loop takes the rest,
    and weights stored in a narrower dtype than `x`, which take no gradient. On a CPU torch's multiplies for every expert, also
    for those without rows, which are most of them while tokens are generated, and by `x @ weight.T` also for few rows.
    """
    if weight.dtype.itemsize < x.dtype.itemsize:
        return grouped_matmul_loop(x, weight, ends)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type == "cpu" and not (needs_gradient or torch.is_autocast_enabled("cpu") or use_reference()):
        mean = ceil(len(x) / len(weight))
        if len(x) * _EXPERTS_A_ROW <= len(weight) or few_rows.are_few(mean, x, weight):
            return _of_experts_with_rows(x, weight, ends, few_rows.product)
    whole_rows = all(width * x.itemsize % 16 == 0 for width in weight.shape[1:])  # both: one is a row of the gradient
    if x.dtype in _FUSED_DTYPES and whole_rows and len(x) and x.stride(1) == 1 and not use_reference():
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return grouped_matmul_loop(x, weight, ends)


def grouped_matmul_loop(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "expert d_out d_in"], ends: Int[Tensor, " expert"]
) -> Float[Tensor, "n d_out"]:
    """The same, one expert after another: the reference."""
    if weight.dtype.itemsize < x.dtype.itemsize:
        return _of_experts_with_rows(x, weight, ends, _widened_product)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = x.split(counts)
    # unbind once: indexing a stacked weight expert by expert would make a gradient of the whole stack for each
    out = torch.cat([rows_e @ weight_e.T for rows_e, weight_e in zip(rows, weight.unbind(0), strict=True)])
    return out.to(x.dtype)  # as torch's, also under autocast


def _of_experts_with_rows(
    x: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "expert d_out d_in"],
    ends: Int[Tensor, " expert"],
    product: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "n d_out"]:
    """`product(rows, weight)` of every expert that has rows, and none for the others."""
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            pieces.append(product(x[start:end], weight[expert]))
            start = end
    return torch.cat(pieces).to(x.dtype) if pieces else x.new_empty(0, weight.shape[1])


class _WidenedProduct(torch.autograd.Function):
    """`x @ weight.T` in the dtype of x. The weight is widened again for the gradient of x, not kept, and has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def _widened_product(x: Float[Tensor, "n d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "n d_out"]:
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"experts stored in {weight.dtype} for products in {x.dtype} take no gradient: load the model without store= to "
            "train it, or call model.requires_grad_(False)"
        )
    return _WidenedProduct.apply(x, weight)
