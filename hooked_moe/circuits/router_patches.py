"""Patching and attribution of routers: what the clean run's routing does to the corrupted run, its contents left as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.expert_patches import asked_positions
from hooked_moe.circuits.gradients import residual_gradients
from hooked_moe.circuits.metrics import Metric, check_metric, effects_of_deltas, name_of, require_slope, total_effect
from hooked_moe.circuits.pairs import Clean, PromptPair, prompt_pair
from hooked_moe.circuits.results import RouterAttribution, TokenPatches
from hooked_moe.components.moe import Routing
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens, checked_layers
from hooked_moe.kernels import routing
from hooked_moe.transformer import Transformer

RoutingPart = Literal["logits", "indices", "weights"]


@torch.no_grad()
@without_autocast()
def get_act_patch_router(
    model: Transformer,
    corrupted_tokens: Tokens,
    clean_cache: Clean,
    metric: Metric,
    what: RoutingPart = "logits",
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> TokenPatches:
    """Route one token of one layer of the corrupted run as the clean run does, and measure the metric.

    `what` is "logits" (the token goes to the clean run's experts with its weights; they read the corrupted run's input),
    "indices" (to its experts, weighed by the corrupted run's own scores), or "weights" (to the corrupted run's own experts with
    the clean run's weights, slot by slot): what hooks on `hook_router_logits`, `hook_expert_indices` and `hook_expert_weights`
    do. All else as in `get_act_patch_expert`.
    """
    if what not in get_args(RoutingPart):
        raise ValueError(f"what must be one of {', '.join(map(repr, get_args(RoutingPart)))}, not {what!r}")
    chosen = checked_layers(model, layers)
    pair = prompt_pair(model, clean_cache, corrupted_tokens, attention_mask)
    check_metric(metric, pair)
    deltas = {layer: _rerouted(pair, layer, _routing_of(pair, layer, what))[:, :, None] for layer in chosen}
    asked = asked_positions(pair, positions)
    values = effects_of_deltas(pair, deltas, metric, asked, memory_budget, progress)[..., 0]
    return TokenPatches(chosen, values, total_effect(pair, metric), name_of(metric), what)


@torch.inference_mode(False)
@without_autocast()
def router_attribution(
    model: Transformer,
    clean: Clean,
    corrupt: Tokens,
    metric: Metric,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> RouterAttribution:
    """What each router logit does to the metric: its slope below the boundary of selection, and the exact step across it.

    `soft` is d metric / d (router logit) times the difference between clean and corrupted run, the selection held fixed: the
    first order of what changes weights alone. `hard` is the metric once the next-ranked expert has taken the slot of the last
    one, minus that of the corrupted run: an exact patch, which no gradient sees. The last is that with the lowest score, plus
    the selection bias where a family has one; it is replaced as by `removal="reroute"`. `metric` as in
    `attribution_patch_experts`.
    """
    model.require_weights("a gradient")
    chosen = checked_layers(model, layers)
    pair = prompt_pair(model, clean, corrupt, attention_mask)
    check_metric(metric, pair)
    require_slope(metric)
    asked = asked_positions(pair, positions)
    gradients = residual_gradients(pair, metric)
    soft = [_padded(_soft(pair, layer, gradients[layer]), max(model.cfg.experts_in(each) for each in chosen)) for layer in chosen]
    with torch.no_grad():
        swaps = {layer: _rerouted(pair, layer, _last_replaced(pair, layer))[:, :, None] for layer in chosen}
        hard = effects_of_deltas(pair, swaps, metric, asked, memory_budget, progress)[..., 0]
        by_expert = torch.stack(soft).masked_fill(~asked[None, ..., None], float("nan"))
        return RouterAttribution(chosen, by_expert, hard, total_effect(pair, metric), name_of(metric))


def _routing_of(pair: PromptPair, layer: int, what: RoutingPart) -> Routing:
    clean, corrupt = pair.experts("clean", layer), pair.experts("corrupt", layer)
    if what == "weights":
        return Routing(corrupt.indices, clean.weights)
    if what == "logits":
        return Routing(clean.indices, clean.weights)
    scores = routing.score(_router_logits(pair, layer), pair.moe(layer).router.rule)
    weights = routing.weigh(scores, clean.indices, pair.moe(layer).router.rule)
    return Routing(clean.indices, weights.to(clean.weights.dtype))


def _last_replaced(pair: PromptPair, layer: int) -> Routing:
    """The corrupted run's routing with the next-ranked expert in place of the last: of the selection, whose bias counts."""
    logits, corrupt = _router_logits(pair, layer), pair.experts("corrupt", layer)
    rule, bias = pair.moe(layer).router.rule, pair.moe(layer).router.b_selection
    if pair.moe(layer).num_experts == rule.slots:
        return Routing(corrupt.indices, corrupt.weights)  # there is no other expert
    scores = routing.score(logits, rule)
    last = routing.by_score(corrupt.indices, scores if bias is None else scores + bias)[..., -1:]
    keep = torch.ones_like(logits, dtype=torch.bool).scatter(-1, last, False)
    scores = scores * keep
    indices = routing.select(scores, rule, keep, bias)
    return Routing(indices, routing.weigh(scores, indices, rule).to(corrupt.weights.dtype))


def _rerouted(pair: PromptPair, layer: int, new: Routing) -> Float[Tensor, "batch pos d_model"]:
    """What another routing of the corrupted run adds to the residual stream after the block."""
    moe, corrupt = pair.moe(layer), pair.experts("corrupt", layer)
    outputs = moe.run_experts(pair.mlp_input("corrupt", layer), new.indices).in_slots()
    change = _mix(new.weights, outputs) - _mix(corrupt.weights, corrupt.outputs)
    same = (new.indices == corrupt.indices).all(-1) & (new.weights == corrupt.weights).all(-1)
    return change.masked_fill(same[..., None], 0.0)


def _mix(weights: Float[Tensor, "batch pos slot"], outputs: Float[Tensor, "batch pos slot d_model"]) -> Tensor:
    return (weights.unsqueeze(-1) * outputs).sum(-2)


def _router_logits(
    pair: PromptPair, layer: int, run: Literal["clean", "corrupt"] = "corrupt"
) -> Float[Tensor, "batch pos expert"]:
    with torch.no_grad():
        return pair.moe(layer).router(pair.mlp_input(run, layer)).clone()


def _soft(pair: PromptPair, layer: int, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
    """Through the weights of the experts that the corrupted run selects."""
    rule, corrupt = pair.moe(layer).router.rule, pair.experts("corrupt", layer)
    logits = _router_logits(pair, layer).requires_grad_()
    along = (at_least_float32(corrupt.outputs) * at_least_float32(gradient).unsqueeze(2)).sum(-1).detach()
    with torch.enable_grad():
        weights = routing.weigh(routing.score(logits, rule), corrupt.indices, rule)
        (slope,) = torch.autograd.grad((weights * along).sum(), logits)
    return slope * (_router_logits(pair, layer, "clean") - logits.detach())


def _padded(x: Float[Tensor, "batch pos expert"], experts: int) -> Float[Tensor, "batch pos experts"]:
    return torch.nn.functional.pad(x, (0, experts - x.shape[-1]))
