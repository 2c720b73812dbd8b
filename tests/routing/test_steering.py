"""Steering: forced experts are in every selection and avoided ones in none, also while generating; what is not steered stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE, KeyValueCache
from hooked_moe.routing import record_routes, routing_table, steer_routes
from tests.conftest import ARCHITECTURES, EVERY_ARCHITECTURE

GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}


FORCIBLE = [name for name, options in ARCHITECTURES.items() if not options.get("selection_bias")]
"""Where experts are selected by their own scores alone."""


@pytest.mark.parametrize("architecture", FORCIBLE)
def test_forced_experts_are_in_every_selection_and_avoided_ones_in_none(model: HookedMoE, tokens: Tensor) -> None:
    layer, k = model.cfg.moe_layers[-1], model.cfg.experts_per_token
    for prefer, avoid in (([4], []), ([], [5]), ([0, 3], [2]), ([2, 3, 0], [])):
        with steer_routes(model, {layer: prefer}, {layer: avoid}):
            routes = record_routes(model, tokens)
        index = routes.expert_index[routes.layers.index(layer)]
        assert all(bool((index == expert).any(-1).all()) for expert in prefer)
        assert not any(bool((index == expert).any()) for expert in avoid)
        assert all(len(set(chosen)) == k for chosen in index.flatten(0, 1).tolist())
        assert bool((routes.weight > 0).all())


@EVERY_ARCHITECTURE
def test_strength_0_changes_no_bit(model: HookedMoE, tokens: Tensor) -> None:
    layer = model.cfg.moe_layers[0]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        before = model(tokens, attention_mask=mask)
        with steer_routes(model, {layer: [1]}, {layer: [3]}, 0.0):
            assert torch.equal(model(tokens, attention_mask=mask), before)
        with steer_routes(model, {layer: [1, 2]}, strength=5.0, positions=[]):
            assert torch.equal(model(tokens, attention_mask=mask), before)


@EVERY_ARCHITECTURE
def test_a_finite_strength_is_added_and_subtracted(model: HookedMoE, tokens: Tensor) -> None:
    layer = model.cfg.moe_layers[0]

    def by_hand(logits: Tensor, hook: Any) -> Tensor:
        for expert, change in ((1, 0.75), (4, 0.75), (0, -0.75)):
            logits[..., expert] = logits[..., expert] + change
        return logits

    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.mlp.hook_router_logits", by_hand)])
        with steer_routes(model, {layer: [1, 4]}, {layer: [0]}, 0.75) as steered:
            torch.testing.assert_close(steered(tokens), expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(model(tokens), expected)


def test_weights_are_those_of_the_edited_logits(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    logits = cache["router_logits", 1].clone()
    logits[..., 5] = logits.amax(-1) + 0.01
    logits[..., 2] = cache["router_logits", 1].amin(-1) - 0.01
    with steer_routes(model, {1: [5]}, {1: [2]}):
        routes = record_routes(model, tokens)
    expected = logits.softmax(-1).topk(3, dim=-1)
    assert torch.equal(routes.expert_index[1], expected.indices)
    torch.testing.assert_close(routes.weight[1], expected.values)
    assert bool((routes.expert_index[1, ..., 0] == 5).all())


SELECTIONS: dict[str, tuple[Any, Callable[[int], bool]]] = {
    "from": (slice(4, None), lambda pos: pos >= 4),
    "up to": (slice(None, 6), lambda pos: pos < 6),
    "every other": (slice(1, 9, 2), lambda pos: pos in (1, 3, 5, 7)),
    "listed": ([2, 9, 40], lambda pos: pos in (2, 9)),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("cuts", [[11], [5, 6], [1] * 11])
def test_positions_are_columns_of_the_whole_text(model: HookedMoE, tokens: Tensor, name: str, cuts: list[int]) -> None:
    positions, steered = SELECTIONS[name]
    with torch.no_grad(), steer_routes(model, {1: [5]}, {1: [0]}, positions=positions):
        cache, indices = KeyValueCache(model.cfg.n_layers), []
        for part in tokens.split(cuts, dim=1):
            _, seen = model.run_with_cache(part, past_kv_cache=cache, names_filter="blocks.1.mlp.hook_expert_indices")
            indices.append(seen["expert_indices", 1])
        index = torch.cat(indices, dim=1)
    own = record_routes(model, tokens).expert_index[1]
    for pos in range(11):
        assert bool((index[:, pos] == 5).any(-1).all()) or not steered(pos)
        assert steered(pos) or torch.equal(index[:, pos], own[:, pos])


def test_a_mask_steers_tokens_of_its_own(model: HookedMoE, tokens: Tensor) -> None:
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    own = record_routes(model, tokens).expert_index[0]
    with steer_routes(model, {0: [5, 4]}, positions=mask):
        index = record_routes(model, tokens).expert_index[0]
        with pytest.raises(
            ValueError, match=r"positions has shape \[2, 11\]; this forward pass is of 1 rows and of columns 0 to 3"
        ):
            model(tokens[:1, :4])
        with pytest.raises(ValueError, match="use a slice where a text grows"):
            model.generate(tokens, 2, **GREEDY)
    assert torch.equal(index[~mask], own[~mask])
    assert bool((index[mask] == 5).any(-1).all())


@pytest.mark.parametrize("architecture", FORCIBLE)
@pytest.mark.parametrize("positions", [None, slice(7, None), slice(3, 9)])
def test_generation_is_steered_with_a_cache_as_without(model: HookedMoE, tokens: Tensor, positions: Any) -> None:
    layer, prompt = model.cfg.moe_layers[-1], tokens[:, :7]
    real = torch.ones_like(prompt)
    real[0, :2] = 0
    plain = model.generate(prompt, 8, attention_mask=real, **GREEDY)
    with steer_routes(model, {layer: [4, 5]}, {layer: [0]}, positions=positions):
        cached = model.generate(prompt, 8, attention_mask=real, **GREEDY)
        again = model.generate(prompt, 8, attention_mask=real, use_past_kv_cache=False, **GREEDY)
        whole = record_routes(model, cached, torch.cat((real, torch.ones(2, 8, dtype=real.dtype)), dim=1))
    assert torch.equal(cached, again)
    assert positions is not None or not torch.equal(cached, plain)
    chosen = (whole.expert_index[whole.layers.index(layer)] == 4).any(-1)
    assert bool(chosen[:, positions or slice(None)].all())


def test_tables_are_of_the_steered_model(model: HookedMoE, tokens: Tensor) -> None:
    with steer_routes(model, {1: [5]}):
        (grid,) = routing_table(model, tokens, [1]).grids("expert", "routing_weight")
    assert (grid["expert"] == 5).any(-1).all()


def test_the_block_leaves_nothing_behind(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(KeyError, match="inside"), steer_routes(model, {0: [1]}):
            raise KeyError("inside")
        assert torch.equal(model(tokens), before)
    assert not model._forward_pre_hooks


def test_two_blocks_act_together(model: HookedMoE, tokens: Tensor) -> None:
    with steer_routes(model, {0: [5]}), steer_routes(model, avoid={1: [0]}):
        routes = record_routes(model, tokens)
    assert bool((routes.expert_index[0] == 5).any(-1).all())
    assert not bool((routes.expert_index[1] == 0).any())


def refused(model: HookedMoE, message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message), steer_routes(model, *args, **options):
        pass


def test_bad_requests_are_answered(model: HookedMoE, make_model: Any, unchecked: None) -> None:
    refused(model, "nothing to steer: give prefer=")
    refused(model, r"layer 7 has no experts; layers \[0, 1, 2\] have", {7: [0]})
    refused(make_model("deepseek"), r"layer 0 has no experts; layers \[1, 2\] have", None, {0: [0]})
    refused(model, "expert 6 is out of range: layer 1 has experts 0 to 5", {1: [6]})
    refused(model, "expert -1 is out of range", {1: [-1]})
    refused(model, r"the experts of layer 1 must be a list of whole numbers, as in \[3\], not the number 3", {1: 3})
    refused(model, "a layer must be a whole number, not 'one'", {"one": [3]})
    refused(make_model("glm"), "selects experts by more than their own scores: give a finite strength", {1: [0]})
    refused(model, "expert 2 of layer 1 is both preferred and avoided", {1: [2]}, {1: [2, 3]})
    refused(model, "4 experts of layer 1 are preferred, and a token has 3: give a finite strength", {1: [0, 1, 2, 3]})
    refused(model, "only 2 experts of layer 1 are not avoided, and a token has 3", avoid={1: [0, 1, 2, 3]})
    refused(model, "strength must be 0 or more, not -1", {1: [0]}, strength=-1)
    refused(model, "strength must be 0 or more, not nan", {1: [0]}, strength=math.nan)
    refused(model, r"positions must be whole numbers from 0 .*, not \[-1\]", {1: [0]}, positions=[-1])
    refused(model, "positions must be whole numbers from 0", {1: [0]}, positions=slice(-3, None))
    refused(
        model,
        r"positions as a tensor must be a bool mask \[batch, pos\], not torch.int64 \[2\]",
        {1: [0]},
        positions=torch.tensor([1, 2]),
    )


def test_what_groups_forbid_is_refused_and_the_rest_holds(make_model: Any, tokens: Tensor) -> None:
    """Three groups of two experts, of which a token gets two groups and three experts."""
    model = make_model("deepseek")
    refused(model, "the preferred experts of layer 1 are in 3 groups, and a token goes to experts of 2", {1: [0, 2, 4]})
    refused(model, "only 2 experts of 2 groups of layer 1 are not avoided, and a token has 3", avoid={1: [0, 2]})
    with steer_routes(model, {1: [0, 1, 4]}, strength=math.inf):
        assert bool((record_routes(model, tokens).expert_index[0].sort(-1).values == torch.tensor([0, 1, 4])).all())
    with steer_routes(model, avoid={1: [0, 1]}):
        assert bool((record_routes(model, tokens).expert_index[0] >= 2).all())
