"""Which experts a token goes to and with what weight, and the order that puts the copies of tokens together by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import by_operator
from hooked_moe.kernels.operators import operator


class Rule(NamedTuple):
    """How a family routes, as its config says."""

    slots: int
    """Experts per token."""
    renormalize: bool = False
    """Whether the weights are rescaled to sum to one."""
    scale: float = 1.0
    """Of the weights, at last."""
    groups: int = 1
    """Experts stand in so many groups of neighbours (1: they do not), ..."""
    groups_kept: int = 1
    """... of which a token goes only to those with the most probable best expert (arXiv 2405.04434, section 2.2.2)."""


def route(
    logits: Float[Tensor, "token expert"], rule: Rule, keep: Bool[Tensor, "token expert"] | None = None
) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
    """Routing weights and the experts that they are of, most probable first. Of equally probable experts the first is taken.

    Where `keep` is False, an expert has no probability, so that the next one takes its slot.
    """
    return _route(logits, keep, *rule)


def route_reference(
    logits: Float[Tensor, "token expert"],
    keep: Bool[Tensor, "token expert"] | None,
    slots: int,
    renormalize: bool,
    scale: float,
    groups: int,
    groups_kept: int,
) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
    """The same by its definition."""
    probabilities = logits.softmax(dim=-1)
    if keep is not None:
        probabilities = probabilities * keep
    eligible = probabilities
    if groups > 1:
        by_group = probabilities.unflatten(-1, (groups, -1))
        best = by_group.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, :groups_kept]
        chosen = torch.zeros(by_group.shape[:-1], dtype=torch.bool, device=logits.device).scatter(-1, best, True)
        eligible = by_group.masked_fill(~chosen.unsqueeze(-1), -1.0).flatten(-2)
    indices = eligible.sort(dim=-1, descending=True, stable=True).indices[:, :slots].contiguous()
    weights = probabilities.gather(-1, indices)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
    return weights * scale, indices


def group_by_expert(
    indices: Int[Tensor, "token slot"], num_experts: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, "token slot"], Int[Tensor, " expert"]]:
    """`order`: the flat slots sorted by expert, in their old order within each; `place`, its inverse; `ends[e]`, where the rows
    of expert e end (int32). The operator waits for nothing."""
    if by_operator(indices):
        return _group_by_expert(indices, num_experts)
    flat = indices.flatten()
    narrow = torch.uint8 if num_experts <= 256 else torch.int16  # sorting narrow keys is several times faster
    order = flat.to(narrow).argsort(stable=True)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).to(torch.int32)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(flat), device=flat.device)
    return order, place.view(indices.shape), ends


def group_by_expert_reference(
    indices: Int[Tensor, "token slot"], num_experts: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, "token slot"], Int[Tensor, " expert"]]:
    """The same by its definition."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=flat.device), right=True, out_int32=True)
    return order, order.argsort().view(indices.shape), ends


# --- operators ---------------------------------------------------------------------------------------------------------------


def _launch_route(
    logits: Tensor, keep: Tensor | None, slots: int, renormalize: bool, scale: float, groups: int, groups_kept: int
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights, indices = _route_shapes(logits, keep, slots, renormalize, scale, groups, groups_kept)
    aligned = launches.rows_are_aligned(logits)
    launch = launches.route(tokens=tokens, experts=experts, slots=slots, groups=groups, weights=weights.dtype, aligned=aligned)
    keep = None if keep is None else keep.contiguous()
    sizes = tokens, experts, slots, groups, groups_kept
    nvrtc.run(launch, indices, weights, logits, keep, *sizes, int(renormalize), float(scale))
    return weights, indices


def _route_shapes(
    logits: Tensor, keep: Tensor | None, slots: int, renormalize: bool, scale: float, groups: int, groups_kept: int
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], slots)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _launch_group_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = indices.contiguous()
    entries = indices.numel()
    order, place, ends = _group_by_expert_shapes(indices, num_experts)
    count = launches.group_count(entries=entries, experts=num_experts)
    counts = ends.new_empty(num_experts, count.grid[0])
    totals = ends.new_empty(num_experts)
    nvrtc.run(count, counts, indices, entries, num_experts)
    nvrtc.run(launches.group_scan(experts=num_experts), counts, totals, count.grid[0])
    scatter = launches.group_scatter(entries=entries, experts=num_experts)
    nvrtc.run(scatter, order, place, ends, indices, counts, totals, entries, num_experts)
    return order, place, ends


def _group_by_expert_shapes(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = indices.shape[0] * indices.shape[1]
    return indices.new_empty(n), torch.empty_like(indices), indices.new_empty(num_experts, dtype=torch.int32)


_route = operator(
    "route",
    "(Tensor logits, Tensor? keep, int slots, bool renormalize, float scale, int groups, int groups_kept) -> (Tensor, Tensor)",
    definition=route_reference,
    launch=_launch_route,
    shapes=_route_shapes,
)
_group_by_expert = operator(
    "group_by_expert",
    "(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor)",
    definition=group_by_expert_reference,
    launch=_launch_group_by_expert,
    shapes=_group_by_expert_shapes,
)
