"""Around the experts' two grouped products: a copy of each token for each of its experts, and the activation between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.config import ClampedSwiGLU
from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator


def gather_rows(
    x: Float[Tensor, "token d_model"], order: Int[Tensor, " n"], place: Int[Tensor, "token slot"]
) -> Float[Tensor, "n d_model"]:
    """`out[r] = x[order[r] // slots]`: row r is of slot `order[r] % slots` of that token. `place` is the inverse of `order`."""
    if use_kernels(x):
        return _gather_rows(x, order, place)
    return _gather_rows_reference(x, order, place)


def _gather_rows_reference(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    return x.index_select(0, order // place.shape[-1])


def swiglu(gate_and_up: Float[Tensor, "n gate_and_up"], clamp: ClampedSwiGLU | None = None) -> Float[Tensor, "n d_expert"]:
    """`silu(gate) * up`, of rows whose first half is the gate; or what `clamp` says."""
    if clamp is None:
        return _swiglu(gate_and_up) if use_kernels(gate_and_up) else _swiglu_reference(gate_and_up)
    if use_kernels(gate_and_up):
        return _clamped_swiglu(gate_and_up, clamp.limit, clamp.alpha)
    return _clamped_swiglu_reference(gate_and_up, clamp.limit, clamp.alpha)


def _swiglu_reference(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    gate = gate.clone(memory_format=torch.contiguous_format)  # torch's silu takes up to three times as long for halves of rows
    if torch.is_grad_enabled() and gate.requires_grad:
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def _clamped_swiglu_reference(gate_and_up: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (alpha * gate).sigmoid())


# --- operators ---------------------------------------------------------------------------------------------------------------


def _launch_gather_rows(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    x, place = x.contiguous(), place.contiguous()
    (tokens, slots), width = place.shape, x.shape[1]
    out = x.new_empty(len(order), width)
    aligned = launches.rows_are_aligned(x, out)
    launch = launches.gather_rows(tokens=tokens, width=width, dtype=x.dtype, aligned=aligned)
    nvrtc.run(launch, out, x, place, tokens, slots, width, width)
    return out


def _gather_rows_shapes(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _launch_swiglu(gate_and_up: Tensor, *limit_and_alpha: float) -> Tensor:
    both = gate_and_up.contiguous()
    rows, width = len(both), both.shape[1] // 2
    out = both.new_empty(rows, width)
    aligned = launches.rows_are_aligned(both, out)
    launch = launches.swiglu(rows=rows, width=width, dtype=both.dtype, aligned=aligned, clamped=bool(limit_and_alpha))
    nvrtc.run(launch, out, both, rows, width, 2 * width, *map(float, limit_and_alpha))
    return out


def _swiglu_shapes(gate_and_up: Tensor, *limit_and_alpha: float) -> Tensor:
    return gate_and_up.new_empty(gate_and_up.shape[0], gate_and_up.shape[1] // 2)


_gather_rows = operator(
    "gather_rows",
    "(Tensor x, Tensor order, Tensor place) -> Tensor",
    definition=_gather_rows_reference,
    launch=_launch_gather_rows,
    shapes=_gather_rows_shapes,
)
_clamped_swiglu = operator(
    "clamped_swiglu",
    "(Tensor gate_and_up, float limit, float alpha) -> Tensor",
    definition=_clamped_swiglu_reference,
    launch=_launch_swiglu,
    shapes=_swiglu_shapes,
)
_swiglu = operator(
    "swiglu",
    "(Tensor gate_and_up) -> Tensor",
    definition=_swiglu_reference,
    launch=_launch_swiglu,
    shapes=_swiglu_shapes,
)
