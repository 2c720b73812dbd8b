"""Replay: own routes to the bit, other routes as hooks would put them there, and planted effects of routing and of content."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.routing import (
    Condition,
    Routes,
    RoutingAgainstContent,
    record_routes,
    replay_routes,
    routing_against_content,
    steer_routes,
)
from tests.conftest import EVERY_ARCHITECTURE, random_model
from tests.support.hf_models import FAMILIES, pair_of, random_tokens


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return mask


@pytest.fixture
def others(tokens: Tensor) -> Tensor:
    return torch.randint(0, 61, tokens.shape, generator=torch.Generator().manual_seed(9))


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("weights", [True, False])
def test_own_routes_change_no_bit(model: HookedMoE, tokens: Tensor, mask: Tensor, weights: bool) -> None:
    with torch.no_grad():
        for padding in (None, mask):
            expected = model(tokens, attention_mask=padding)
            routes = record_routes(model, tokens, padding)
            assert torch.equal(replay_routes(model, tokens, routes, attention_mask=padding, weights=weights), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_steered_and_replayed(family: str) -> None:
    ours, tokens = pair_of(f"{family}-plain").ours, random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    layer = ours.cfg.moe_layers[-1]
    with torch.no_grad():
        plain = ours(tokens, attention_mask=mask)
        strength = 1.0 if ours.cfg.selection_bias else math.inf
        with steer_routes(ours, {layer: [1, 8]}, {layer: [0, 5]}, strength):
            steered = ours(tokens, attention_mask=mask)
            routes = record_routes(ours, tokens, mask)
        assert torch.equal(replay_routes(ours, tokens, routes, attention_mask=mask), steered)
        assert torch.equal(replay_routes(ours, tokens, record_routes(ours, tokens, mask), attention_mask=mask), plain)
    index = routes.expert_index[routes.layers.index(layer)]
    if strength == math.inf:
        assert bool((index == 1).any(-1).all() and (index == 8).any(-1).all())
        assert not bool((index == 0).any() or (index == 5).any())
    assert not torch.equal(steered, plain)


@EVERY_ARCHITECTURE
def test_routes_are_those_of_the_run(model: HookedMoE, tokens: Tensor, mask: Tensor) -> None:
    routes = record_routes(model, tokens, mask)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert routes.layers == model.cfg.moe_layers
    for place, layer in enumerate(routes.layers):
        assert torch.equal(routes.expert_index[place], cache["expert_indices", layer])
        assert torch.equal(routes.weight[place], cache["expert_weights", layer])
    assert torch.equal(routes.real, mask.bool())


@EVERY_ARCHITECTURE
def test_other_routes_are_what_hooks_put_there(model: HookedMoE, tokens: Tensor, others: Tensor) -> None:
    routes, layers = record_routes(model, others), model.cfg.moe_layers[-1:]
    _, cache = model.run_with_cache(others)

    def put(activation: Tensor, hook: Any) -> Tensor:
        for row in range(activation.shape[0]):
            for pos in range(activation.shape[1]):
                activation[row, pos] = cache[hook.name][row, pos]
        return activation

    indices = [(f"blocks.{layer}.mlp.hook_expert_indices", put) for layer in model.cfg.moe_layers]
    weights = [(f"blocks.{layer}.mlp.hook_expert_weights", put) for layer in model.cfg.moe_layers]
    with torch.no_grad():
        plain = model(tokens)
        both = replay_routes(model, tokens, routes)
        assert torch.equal(both, model.run_with_hooks(tokens, fwd_hooks=[*indices, *weights]))
        alone = replay_routes(model, tokens, routes, weights=False)
        assert torch.equal(alone, model.run_with_hooks(tokens, fwd_hooks=indices))
        one = replay_routes(model, tokens, routes, layers=layers)
        own = [hook for hook in (*indices, *weights) if f"blocks.{layers[0]}." in hook[0]]
        assert torch.equal(one, model.run_with_hooks(tokens, fwd_hooks=own))
    assert len({tuple(x.flatten()[:50].tolist()) for x in (plain, both, alone, one)}) == 4
    assert torch.isfinite(replay_routes(model, tokens, routes, return_type="loss"))


def test_routes_are_saved_and_replayed_from_the_file(model: HookedMoE, tokens: Tensor, others: Tensor, tmp_path: Path) -> None:
    routes = record_routes(model, others)
    routes.save(tmp_path / "routes.parquet")
    again = Routes.load(tmp_path / "routes.parquet")
    assert torch.equal(replay_routes(model, tokens, again), replay_routes(model, tokens, routes))
    assert repr(again) == "Routes(3 layer x 2 batch x 11 pos x 3 slot: expert_index, weight, real)"


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def with_changed(model: HookedMoE, *parts: str) -> HookedMoE:
    """A copy whose parameters of these names are others."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if any(part in name for part in parts):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return changed


@EVERY_ARCHITECTURE
def test_a_change_of_routers_alone_is_all_routing(model: HookedMoE, tokens: Tensor, mask: Tensor) -> None:
    rerouted = with_changed(model, "router.W")
    effects = routing_against_content(Condition(model, tokens, mask), Condition(rerouted, tokens, mask), metric)
    assert torch.equal(effects.content_effect, torch.zeros(2))
    assert torch.equal(effects.interaction, torch.zeros(2))
    assert torch.equal(effects.routing_effect, effects.total)
    with torch.no_grad():
        expected = metric(rerouted(tokens, attention_mask=mask)) - metric(model(tokens, attention_mask=mask))
    torch.testing.assert_close(effects.total, expected)
    assert float(effects.total.abs().min()) > 1e-3


@EVERY_ARCHITECTURE
def test_a_change_that_no_router_sees_is_all_content(model: HookedMoE, tokens: Tensor) -> None:
    changed = with_changed(model, "blocks.2.mlp.experts")
    effects = routing_against_content(Condition(model, tokens), Condition(changed, tokens), metric)
    assert torch.equal(effects.routing_effect, torch.zeros(2))
    assert torch.equal(effects.content_effect, effects.total)
    assert float(effects.total.abs().min()) > 1e-3


def test_the_four_runs_are_those_by_hand_and_the_effects_add_up(
    model: HookedMoE, tokens: Tensor, others: Tensor, tmp_path: Path
) -> None:
    effects = routing_against_content(Condition(model, tokens), Condition(model, others), metric, weights=False)
    for content, text in enumerate((tokens, others)):
        for route, source in enumerate((tokens, others)):
            logits = replay_routes(model, text, record_routes(model, source), weights=False)
            torch.testing.assert_close(effects.value[content, route], metric(logits))
    torch.testing.assert_close(effects.routing_effect + effects.content_effect, effects.total)
    (a, b), (c, d) = effects.value
    torch.testing.assert_close(effects.routing_effect, (b - a + d - c) / 2)
    torch.testing.assert_close(effects.interaction, d - c - b + a)
    effects.save(tmp_path / "effects.parquet")
    assert torch.equal(RoutingAgainstContent.load(tmp_path / "effects.parquet").value, effects.value)
    single = routing_against_content(Condition(model, tokens), Condition(model, others), lambda logits: metric(logits).mean())
    assert single.total.shape == (1,)


def test_routes_that_do_not_fit_are_refused(
    model: HookedMoE, make_model: Any, tokens: Tensor, mask: Tensor, unchecked: None
) -> None:
    routes = record_routes(model, tokens)
    with pytest.raises(ValueError, match=r"the routes are of tokens \[2, 11\], these tokens are \[2, 5\]: they must be as many"):
        replay_routes(model, tokens[:, :5], routes)
    with pytest.raises(ValueError, match="the routes have padding in other places than these tokens: pad both alike"):
        replay_routes(model, tokens, routes, attention_mask=mask)
    with pytest.raises(ValueError, match=r"layers \[0\] cannot be replayed: the routes are of layers \[0, 1, 2\], and the model"):
        replay_routes(make_model("deepseek"), tokens, routes)
    with pytest.raises(ValueError, match=r"layers \[5\] cannot be replayed"):
        replay_routes(model, tokens, routes, layers=[5])
    with pytest.raises(ValueError, match="the routes have 3 experts a token, and this model 2"):
        replay_routes(make_model("olmoe", experts_per_token=2), tokens, routes)
    with pytest.raises(ValueError, match=r"the routes go to expert 5 of layer 0, which has experts 0 to 3 in this model"):
        replay_routes(make_model("olmoe", num_experts=4), tokens, routes)
    with pytest.raises(ValueError, match=r"the metric gave a tensor \[2, 11\]; expected one number, or one per batch row"):
        routing_against_content(Condition(model, tokens), Condition(model, tokens), lambda logits: logits[..., 0])


def test_routes_in_half_precision_are_saved(tokens: Tensor, tmp_path: Path) -> None:
    model = random_model(dtype=torch.bfloat16)
    routes = record_routes(model, tokens)
    routes.save(tmp_path / "routes.parquet")
    again = Routes.load(tmp_path / "routes.parquet")
    assert torch.equal(again.weight.bfloat16(), routes.weight)
    assert torch.equal(again.expert_index, routes.expert_index)


def test_routes_recorded_in_inference_mode_are_replayed_with_gradients(model: HookedMoE, tokens: Tensor) -> None:
    with torch.inference_mode():
        routes = record_routes(model, tokens)
    replay_routes(model, tokens, routes).sum().backward()
    assert model.blocks[0].mlp.experts.W_in.grad is not None
