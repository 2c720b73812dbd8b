"""Which experts a token goes to and with what weight, and the order that puts the copies of tokens together by expert.

Routing is defined once, in three steps between which hooks can stand: `score`, `select`, `weigh`. `route` takes them in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator


@dataclass(frozen=True)
class RoutingRule:
    """How a family routes, as its config says."""

    slots: int
    """Experts per token."""
    renormalize: bool = False
    """Whether the weights are rescaled to sum to one."""
    scale: float = 1.0
    """What the weights are multiplied by at last."""
    groups: int = 1
    """Experts stand in this many groups of neighbours (1: they do not), ..."""
    groups_kept: int = 1
    """... and a token goes only to experts of this many groups, the ones with the best score."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes an expert's score of its logit."""
    group_score: Literal["max", "top2"] = "max"
    """Whether a group's score is that of its best expert or the sum of its two best."""


Keep = Bool[Tensor, "*token expert"]
Bias = Float[Tensor, " expert"] | Float[Tensor, "*token expert"]
"""Of the scores, for the selection only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""


def route(
    logits: Float[Tensor, "token expert"],
    rule: RoutingRule,
    keep: Bool[Tensor, "token expert"] | None = None,
    bias: Float[Tensor, " expert"] | None = None,
) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
    """Routing weights and the experts that they belong to, highest score first, by the operator `route`.

    Its kernel differs from `route_reference` at exact ties only: of experts, or groups, with equal scores it takes the first.
    """
    return _route(logits, keep, bias, *_as_numbers(rule))


def route_reference(
    logits: Float[Tensor, "token expert"],
    rule: RoutingRule,
    keep: Bool[Tensor, "token expert"] | None = None,
    bias: Float[Tensor, " expert"] | None = None,
) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
    """The definition of routing: score every expert, select the best, weigh them."""
    scores = score(logits, rule, keep)
    indices = select(scores, rule, keep, bias)
    return weigh(scores, indices, rule), indices


def score(logits: Float[Tensor, "*token expert"], rule: RoutingRule, keep: Keep | None = None) -> Float[Tensor, "*token expert"]:
    """Every expert's score; zero where `keep` is False."""
    scores = logits.softmax(dim=-1) if rule.score == "softmax" else logits.sigmoid()
    return scores if keep is None else scores * keep


def select(
    scores: Float[Tensor, "*token expert"], rule: RoutingRule, keep: Keep | None = None, bias: Bias | None = None
) -> Int[Tensor, "*token slot"]:
    """The experts with the highest scores plus bias, highest score first: `torch.topk`, as in transformers.

    Where `keep` is False an expert comes after all others of the token's groups, which the next one then takes the slot of; but
    before those of other groups, which it gives no slot.
    """
    choice = scores if bias is None else scores + bias
    if keep is not None:
        choice = choice.masked_fill(~keep, torch.finfo(choice.dtype).min)
    if rule.groups > 1:
        choice = _within_best_groups(choice, rule)
    indices = choice.topk(rule.slots, dim=-1).indices
    return indices if bias is None else by_score(indices, scores)


def by_score(indices: Int[Tensor, "*token slot"], scores: Float[Tensor, "*token expert"]) -> Int[Tensor, "*token slot"]:
    """The same experts, highest score first."""
    return indices.gather(-1, scores.gather(-1, indices).argsort(dim=-1, descending=True, stable=True))


def _within_best_groups(choice: Float[Tensor, "*token expert"], rule: RoutingRule) -> Float[Tensor, "*token expert"]:
    """Minus infinity outside the token's groups (DeepSeek-V2, arXiv 2405.04434, section 2.2.2, and V3)."""
    by_group = choice.unflatten(-1, (rule.groups, -1))
    of_group = by_group.amax(dim=-1) if rule.group_score == "max" else by_group.topk(2, dim=-1).values.sum(dim=-1)
    best = of_group.topk(rule.groups_kept, dim=-1).indices
    outside = torch.ones(by_group.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, False)
    return by_group.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def weigh(
    scores: Float[Tensor, "*token expert"], indices: Int[Tensor, "*token slot"], rule: RoutingRule
) -> Float[Tensor, "*token slot"]:
    """Routing weights of the given experts: their scores, rescaled to sum to one and scaled as the family does."""
    weights = scores.gather(-1, indices)
    if rule.renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        # The latter as in DeepSeek-V3, whose scores may all be small. Both give zero if a mask leaves no expert.
        positive = total.clamp(min=torch.finfo(total.dtype).tiny) if rule.score == "softmax" else total + 1e-20
        weights = weights / positive
    return weights * rule.scale


def group_by_expert(
    indices: Int[Tensor, "token slot"], num_experts: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, "token slot"], Int[Tensor, " expert"]]:
    """`order`: the flat slots sorted by expert, in their old order within each; `place`, its inverse; `ends[e]`, where the rows
    of expert e end (int32). The operator waits for nothing."""
    if use_kernels(indices):
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
    """The definition, in plain torch."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=flat.device), right=True, out_int32=True)
    return order, order.argsort().view(indices.shape), ends


# --- operators ---------------------------------------------------------------------------------------------------------------


def _as_numbers(rule: RoutingRule) -> tuple[int, bool, float, int, int, bool, bool]:
    """A rule as arguments of an operator, which takes no objects."""
    chosen = rule.score == "sigmoid", rule.group_score == "top2"
    return rule.slots, rule.renormalize, rule.scale, rule.groups, rule.groups_kept, *chosen


def _define_route(
    logits: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    slots: int,
    renormalize: bool,
    scale: float,
    groups: int,
    groups_kept: int,
    sigmoid: bool,
    top2: bool,
) -> tuple[Tensor, Tensor]:
    chosen: Any = "sigmoid" if sigmoid else "softmax", "top2" if top2 else "max"
    return route_reference(logits, RoutingRule(slots, renormalize, scale, groups, groups_kept, *chosen), keep, bias)


def _launch_route(
    logits: Tensor, keep: Tensor | None, bias: Tensor | None, slots: int, renormalize: bool, scale: float, groups: int, *rest: int
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights, indices = _route_shapes(logits, keep, bias, slots)
    aligned = launches.rows_are_aligned(logits)
    launch = launches.route(tokens=tokens, experts=experts, slots=slots, groups=groups, weights=weights.dtype, aligned=aligned)
    keep, bias = (None if x is None else x.contiguous() for x in (keep, bias))
    sizes = tokens, experts, slots, groups, *map(int, rest)
    nvrtc.run(launch, indices, weights, logits, keep, bias, *sizes, int(renormalize), float(scale))
    return weights, indices


def _route_shapes(logits: Tensor, keep: Tensor | None, bias: Tensor | None, slots: int, *rule: object) -> tuple[Tensor, Tensor]:
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
    "(Tensor logits, Tensor? keep, Tensor? bias, int slots, bool renormalize, float scale, int groups, int groups_kept, "
    "bool sigmoid, bool top2) -> (Tensor, Tensor)",
    definition=_define_route,
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
