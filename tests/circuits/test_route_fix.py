"""What patches do to later routers beyond the first order, against forwards in which those routers alone read the change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.circuits import attribution_patch_experts, get_act_patch_expert
from hooked_moe.circuits.gradients import residual_gradients
from hooked_moe.circuits.pairs import PromptPair, expert_deltas, prompt_pair
from hooked_moe.circuits.route_fix import rerouting_terms
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.support.prompt_pairs import METRIC, random_pair, word_pairs

STEP = 1e-7
LARGER = 5
"""What patches are multiplied by, so that some of every architecture's have later routers select other experts."""


def worth_of_routing(
    model: HookedMoE, pair: PromptPair, later: int, at: tuple[int, int], delta: Tensor, gradient: Tensor
) -> Tensor:
    """What the changed routing of one token writes, along the gradient: everything but the router reads the corrupted run."""
    prefix = f"blocks.{later}."

    def add(x: Tensor, hook: Any) -> Tensor:
        x[at] += delta
        return x

    with torch.no_grad(), without_type_checks():
        with model.hooks([(prefix + "hook_resid_mid", add)]):
            _, changed = model.run_with_cache(pair.tokens)
        logits = changed[prefix + "mlp.hook_router_logits"]
        with model.hooks([(prefix + "mlp.hook_router_logits", lambda x, hook: logits.clone())]):
            _, rerouted = model.run_with_cache(pair.tokens)
        _, before = model.run_with_cache(pair.tokens)
        name = prefix + "mlp.hook_routed_out"
        return ((rerouted[name] - before[name])[at] * gradient[at]).sum()


@EVERY_ARCHITECTURE
def test_terms_are_exact_routing_minus_its_slope(architecture: str) -> None:
    model, (clean, corrupt) = random_model(architecture, n_layers=4, dtype=torch.float64), random_pair()
    pair = prompt_pair(model, clean, corrupt)
    gradients = residual_gradients(pair, METRIC)
    layers = model.cfg.moe_layers
    found = {layer: expert_deltas(pair, layer) for layer in layers}
    by_layer = {layer: deltas._replace(delta=LARGER * deltas.delta) for layer, deltas in found.items()}
    terms = rerouting_terms(pair, by_layer, gradients)
    assert (terms[layers[-1]] == 0).all()
    layer, jumps = layers[0], 0
    for batch, pos, slot in (by_layer[layer].experts >= 0).nonzero().tolist()[::5]:
        delta, expected = by_layer[layer].delta[batch, pos, slot], torch.zeros((), dtype=torch.float64)
        for later in layers[1:]:
            exact, small = (
                worth_of_routing(model, pair, later, (batch, pos), scale * delta, gradients[later]) for scale in (1.0, STEP)
            )
            expected = expected + exact - small / STEP
        torch.testing.assert_close(terms[layer][batch, pos, slot], expected, atol=1e-5, rtol=1e-3)
        jumps += bool(expected.abs() > 1e-3)
    assert jumps


@pytest.mark.usefixtures("unchecked")
def test_it_brings_estimates_nearer_to_exact_patches_of_a_trained_model() -> None:
    """128 pairs of prompts on tiny-olmoe: in every layer but the last, after which no token is routed."""
    pairs = word_pairs()
    where = {"positions": [pairs.clean.shape[1] - 1]}
    exact = get_act_patch_expert(pairs.model, pairs.corrupt, pairs.clean, pairs.metric, **where).values
    atp, fixed = (
        attribution_patch_experts(pairs.model, pairs.clean, pairs.corrupt, pairs.metric, method, **where).values
        for method in ("atp", "routefix")
    )
    own = exact.isfinite()
    for layer in range(5):
        errors = [(x[layer] - exact[layer])[own[layer]].abs().mean() for x in (fixed, atp)]
        assert errors[0] < errors[1]
    assert torch.equal(fixed[5][own[5]], atp[5][own[5]])
