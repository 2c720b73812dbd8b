"""AtP* against its definition: forwards in which later patterns alone read a patch, slopes in runs with a layer held fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe.circuits import attribution_patch_experts, get_act_patch_expert
from hooked_moe.circuits.atp_star import atp_star, with_pattern_terms
from hooked_moe.circuits.attention_fix import pattern_terms
from hooked_moe.circuits.gradients import block_gradients
from hooked_moe.circuits.pairs import PromptPair, expert_deltas, prompt_pair
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.support.prompt_pairs import MASKS, METRIC, difference_at_end, random_pair, word_pairs

STEP = 1e-6
LARGER = 5
"""What patches are multiplied by, so that patterns are far from linear in them."""
At = tuple[int, int]


def held(pair: PromptPair, dropped: int | None) -> list[Any]:
    """Hooks that keep what a layer writes as it is in the corrupted run."""
    if dropped is None:
        return []
    names = [f"blocks.{dropped}.hook_{part}_out" for part in ("attn", "mlp")]
    with torch.no_grad():
        _, cache = pair.model.run_with_cache(pair.tokens, attention_mask=pair.attention_mask, names_filter=names)
    return [(name, lambda x, hook: cache[hook.name].clone()) for name in names]


def added(name: str, at: At, delta: Tensor) -> tuple[str, Any]:
    def add(x: Tensor, hook: Any) -> Tensor:
        x[at] += delta
        return x

    return name, add


def pattern_with(pair: PromptPair, later: int, at: At, delta: Tensor) -> Tensor:
    with torch.no_grad(), without_type_checks(), pair.model.hooks([added(f"blocks.{later}.hook_resid_pre", at, delta)]):
        name = f"blocks.{later}.attn.hook_pattern"
        _, cache = pair.model.run_with_cache(pair.tokens, attention_mask=pair.attention_mask, names_filter=name)
    return cache[name]


def worth_of_patterns(pair: PromptPair, later: int, dropped: int | None) -> Tensor:
    """d metric / d pattern, by way of what every head mixes; [batch head query key]."""
    gradients: dict[str, Tensor] = {}
    names = [f"blocks.{later}.attn.hook_{part}" for part in ("z", "v")]
    _, cache = pair.model.run_with_cache(pair.tokens, attention_mask=pair.attention_mask, names_filter=names)

    def leaf(x: Tensor, hook: Any) -> Tensor:
        gradients["z"] = torch.zeros_like(x, requires_grad=True)
        return x + gradients["z"]

    with without_type_checks():
        hooks = [*held(pair, dropped), (names[0], leaf)]
        logits = pair.model.run_with_hooks(pair.tokens, fwd_hooks=hooks, attention_mask=pair.attention_mask)
    (slope,) = torch.autograd.grad(difference_at_end(pair.attention_mask)(logits).sum(), gradients["z"], allow_unused=True)
    v, most = cache[names[1]], pair.model.cfg.clip_qkv
    v = v if most is None else v.clamp(-most, most)
    v = v.repeat_interleave(slope.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bqhe,bkhe->bhqk", slope, v)


def beyond_slope(pair: PromptPair, later: int, at: At, delta: Tensor, worth: Tensor) -> Tensor:
    """What a pattern that reads the patch is worth, less what its slope says."""
    before = pattern_with(pair, later, at, 0 * delta)
    exact, small = (((pattern_with(pair, later, at, scale * delta) - before) * worth).sum() for scale in (1.0, STEP))
    return exact - small / STEP


@pytest.mark.parametrize("padding", ["none", "holes"])
@EVERY_ARCHITECTURE
def test_terms_are_exact_patterns_minus_their_slope(architecture: str, padding: str) -> None:
    model, (clean, corrupt) = random_model(architecture, n_layers=4, dtype=torch.float64), random_pair()
    pair = prompt_pair(model, clean, corrupt, MASKS[padding])
    layer = model.cfg.moe_layers[0]
    deltas = expert_deltas(pair, layer)
    deltas = deltas._replace(delta=LARGER * deltas.delta)
    between = {later: gradient[None] for later, gradient in block_gradients(pair, METRIC)[1].items()}
    terms = pattern_terms(pair, {layer: deltas, 3: expert_deltas(pair, 3)}, between)
    assert (terms[3] == 0).all()
    worth = {later: worth_of_patterns(pair, later, None) for later in range(layer + 1, 4)}
    sizes = []
    for batch, pos, slot in (deltas.experts >= 0).nonzero().tolist()[::9]:
        at, delta = (batch, pos), deltas.delta[batch, pos, slot]
        expected = sum(beyond_slope(pair, later, at, delta, values) for later, values in worth.items())
        torch.testing.assert_close(terms[layer][0, batch, pos, slot], expected, atol=2e-5, rtol=1e-3)
        sizes.append(abs(float(expected)))
    assert max(sizes) > 1e-3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("architecture", ["olmoe", "deepseek"])
def test_importance_is_the_mean_size_of_estimates_without_each_other_layer(architecture: str) -> None:
    model, (clean, corrupt) = random_model(architecture, n_layers=3, dtype=torch.float64), random_pair()
    pair, layer = prompt_pair(model, clean, corrupt), 1
    found = attribution_patch_experts(model, clean, corrupt, METRIC, "atp*", layers=[layer])
    deltas, metric = expert_deltas(pair, layer), difference_at_end(None)
    name = f"blocks.{layer}.hook_resid_post"
    for batch, pos, slot in (deltas.experts >= 0).nonzero().tolist()[::5]:
        at, delta = (batch, pos), deltas.delta[batch, pos, slot]
        sizes = []
        for dropped in (0, 2):
            with torch.no_grad():
                hooks = held(pair, dropped)
                ends = [
                    metric(model.run_with_hooks(corrupt, fwd_hooks=[*hooks, added(name, at, scale * STEP * delta)]))
                    for scale in (1, -1)
                ]
            slope = (ends[0] - ends[1]).sum() / (2 * STEP)
            worth = 0 if dropped == 2 else beyond_slope(pair, 2, at, delta, worth_of_patterns(pair, 2, dropped))
            sizes.append((slope + worth).abs())
        expected = torch.stack(sizes).mean()
        torch.testing.assert_close(found.values[0, batch, pos, slot], expected, atol=1e-6, rtol=1e-3, check_dtype=False)


@pytest.mark.usefixtures("unchecked")
def test_effects_that_cancel_do_so_no_longer() -> None:
    """A change along a direction in which the last layer takes back what the change does by itself."""
    model, (clean, corrupt) = random_model(n_layers=2, dtype=torch.float64), random_pair()
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()  # so that patterns have no part in it
    pair = prompt_pair(model, clean, corrupt)
    past = block_gradients(pair, METRIC, dropped=1)[0][0][:, -1]
    through = block_gradients(pair, METRIC)[0][0][:, -1] - past
    wanted = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 2, 1)
    deltas = expert_deltas(pair, 0)
    delta = torch.zeros_like(deltas.delta)
    delta[:, -1, 0] = torch.linalg.lstsq(torch.stack((past, through), 1), wanted).solution[..., 0]
    by_layer = {0: deltas._replace(delta=delta)}
    for estimate, expected in ((with_pattern_terms, 0.0), (atp_star, 1.0)):
        found = estimate(pair, METRIC, by_layer)[0][:, -1, 0]
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-8, rtol=0)


def correlation(first: Tensor, second: Tensor) -> float:
    own = second.isfinite()
    return float(torch.corrcoef(torch.stack((first[own], second[own])))[0, 1])


@pytest.mark.usefixtures("unchecked")
def test_what_both_change_on_a_trained_model() -> None:
    """128 pairs of prompts on tiny-olmoe. No attention follows the last layer, and no layer but its own can be dropped there."""
    pairs = word_pairs()
    where = {"positions": [pairs.clean.shape[1] - 1]}
    exact = get_act_patch_expert(pairs.model, pairs.corrupt, pairs.clean, pairs.metric, **where).values
    found = {
        method: attribution_patch_experts(pairs.model, pairs.clean, pairs.corrupt, pairs.metric, method, **where).values
        for method in ("atp", "qkfix", "atp*")
    }
    own = exact[5].isfinite()
    torch.testing.assert_close(found["qkfix"][5][own], found["atp"][5][own])
    torch.testing.assert_close(found["atp*"][5][own], found["atp"][5][own].abs())
    for layer in range(6):
        assert correlation(found["qkfix"][layer], exact[layer]) > 0.9
        assert correlation(found["atp*"][layer], exact[layer].abs()) > 0.8
