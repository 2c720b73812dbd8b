"""Estimates of patches against gradients by hand, exact patches, and the limits that they must have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.circuits import attribution_patch_experts, get_act_patch_expert
from hooked_moe.circuits.pairs import expert_deltas, prompt_pair
from hooked_moe.counterfactuals import KL, At, LogitDifference, Loss
from tests.conftest import EVERY_ARCHITECTURE, random_model
from tests.support.prompt_pairs import FIRST, MASKS, METRIC, SECOND, difference_at_end, random_pair, word_pairs


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@EVERY_ARCHITECTURE
def test_atp_is_the_gradient_of_a_hooked_forward_along_the_patch(padding: str, model: HookedMoE) -> None:
    mask, (clean, corrupt) = MASKS[padding], random_pair()
    masks = {"attention_mask": mask}
    _, clean_cache = model.run_with_cache(clean, **masks)
    found = attribution_patch_experts(model, clean_cache, corrupt, METRIC, **masks)
    by_function = attribution_patch_experts(model, clean_cache, corrupt, difference_at_end(mask), **masks)
    torch.testing.assert_close(found.values, by_function.values, atol=1e-5, rtol=1e-4, equal_nan=True)
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient

    names = [f"blocks.{layer}.mlp.hook_routed_out" for layer in model.cfg.moe_layers]
    logits = model.run_with_hooks(corrupt, bwd_hooks=[(name, keep) for name in names], **masks)
    difference_at_end(mask)(logits).sum().backward()
    pair = prompt_pair(model, clean_cache, corrupt, mask)
    for index, layer in enumerate(model.cfg.moe_layers):
        deltas = expert_deltas(pair, layer)
        slots = int((deltas.experts >= 0).sum(-1).max())  # of tokens: what is in the place of padding may need more
        along = (deltas.delta * gradients[names[index]].unsqueeze(2)).sum(-1).masked_fill(deltas.experts < 0, float("nan"))
        torch.testing.assert_close(found.values[index, ..., :slots], along[..., :slots], atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("unchecked")
def test_small_changes_are_linear() -> None:
    """Of a contribution scaled down, the estimate is the patch."""
    model, (clean, corrupt) = random_model(dtype=torch.float64), random_pair()
    _, corrupt_cache = model.run_with_cache(corrupt)
    _, clean_cache = model.run_with_cache(clean)
    near = {name: corrupt_cache[name] for name in corrupt_cache}
    for layer in range(3):
        weights, output = f"blocks.{layer}.mlp.hook_expert_weights", f"blocks.{layer}.mlp.hook_expert_out"
        near[weights] = corrupt_cache[weights] * (1 + 1e-5)
        near[output] = corrupt_cache[output] + 1e-5 * clean_cache[output]
    for part in ("contribution", "content", "routing"):
        exact = get_act_patch_expert(model, corrupt, near, METRIC, part=part)
        estimate = attribution_patch_experts(model, near, corrupt, METRIC, part=part)
        torch.testing.assert_close(estimate.values, exact.values, atol=1e-8, rtol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("unchecked")
@EVERY_ARCHITECTURE
def test_integrated_gradients_add_up_to_the_patch_of_the_whole_block(architecture: str) -> None:
    """At one position and in the last layer, above which no token is routed again: completeness, as the steps grow."""
    model, (clean, corrupt) = random_model(architecture, dtype=torch.float64), random_pair()
    layer, last = model.cfg.moe_layers[-1], model.cfg.n_layers - 1
    assert layer == last
    _, clean_cache = model.run_with_cache(clean)
    name = f"blocks.{layer}.mlp.hook_routed_out"

    def put(x: Tensor, hook: Any) -> Tensor:
        x[:, 6] = clean_cache[name][:, 6]
        return x

    metric = difference_at_end(None)
    with torch.no_grad():
        block = metric(model.run_with_hooks(corrupt, fwd_hooks=[(name, put)])) - metric(model(corrupt))
    errors = []
    for steps in (1, 4, 16):
        found = attribution_patch_experts(model, clean, corrupt, METRIC, "ig", steps, [layer], [6])
        errors.append((found.values[0, :, 6].nansum(-1) - block).abs().max())
    assert errors[1] < errors[0]
    assert errors[2] < errors[1] / 8  # of midpoints, a sixteenth
    torch.testing.assert_close(errors[2], torch.zeros((), dtype=torch.float64), atol=1e-3, rtol=0)
    atp = attribution_patch_experts(model, clean, corrupt, METRIC, "atp", 1, [layer], [6])
    assert (atp.values[0, :, 6].nansum(-1) - block).abs().max() > errors[2]


def correlations(estimate: Tensor, exact: Tensor) -> list[float]:
    measured = exact.isfinite()
    pairs = zip(estimate, exact, measured, strict=True)
    return [float(torch.corrcoef(torch.stack((found[own], expected[own])))[0, 1]) for found, expected, own in pairs]


@pytest.mark.usefixtures("unchecked")
def test_estimates_are_close_to_exact_patches_of_a_trained_model() -> None:
    """128 pairs of prompts on tiny-olmoe, every expert of the final position."""
    pairs = word_pairs()
    where = {"positions": [pairs.clean.shape[1] - 1]}
    exact = get_act_patch_expert(pairs.model, pairs.corrupt, pairs.clean, pairs.metric, **where)
    for method, least in (("atp", 0.85), ("ig", 0.89)):
        found = attribution_patch_experts(pairs.model, pairs.clean, pairs.corrupt, pairs.metric, method, **where)
        assert min(correlations(found.values, exact.values)) >= least
        assert torch.equal(found.expert_index, exact.expert_index)
        assert torch.equal(found.total, exact.total)


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "unknown method": (lambda m, c, k: attribution_patch_experts(m, c, k, METRIC, "eap"), "method must be one of 'atp', 'ig'"),
    "no steps": (lambda m, c, k: attribution_patch_experts(m, c, k, METRIC, "ig", 0), "steps must be a whole number from 1"),
    "a divergence": (lambda m, c, k: attribution_patch_experts(m, c, k, At(-1, KL())), "slope at the corrupted run is zero"),
    "a loss": (lambda m, c, k: attribution_patch_experts(m, c, k, At(-2, Loss())), "attribution takes a function of the logits"),
    "no place": (lambda m, c, k: attribution_patch_experts(m, c, k, LogitDifference(FIRST, SECOND)), "attribution takes"),
    "one number": (lambda m, c, k: attribution_patch_experts(m, c, k, lambda x: x.sum()), r"returned \[\] for 2 rows"),
    "other lengths": (lambda m, c, k: attribution_patch_experts(m, c[:, 1:], k, METRIC), "must have the same lengths"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_has_no_slope_is_refused_by_name(refusal: str) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(random_model(), *random_pair())
