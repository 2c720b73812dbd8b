"""TransformerLens's activation patching runs on our models, unchanged, and finds what a plain loop finds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ActivationCache, HookedMoE, HookPoint
from tests.conftest import EVERY_ARCHITECTURE
from tests.support.hf_models import FAMILIES, pair_of, random_tokens

transformer_lens = pytest.importorskip("transformer_lens")
patching = pytest.importorskip("transformer_lens.patching")
analysis = pytest.importorskip("transformer_lens.tools.analysis")
protocol = pytest.importorskip("transformer_lens.model_protocol")

pytestmark = pytest.mark.usefixtures("unchecked")  # many forwards, whose types other tests check
POS = 4
GRADIENTS = pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])


@pytest.fixture
def clean(tokens: Tensor) -> Tensor:
    return tokens[:, :POS]


@pytest.fixture
def corrupted(tokens: Tensor) -> Tensor:
    """Another first token; the rest is the same."""
    changed = tokens[:, :POS].clone()
    changed[:, 0] = (changed[:, 0] + 7) % 61
    return changed


@pytest.fixture
def cache(model: HookedMoE, clean: Tensor) -> ActivationCache:
    return model.run_with_cache(clean)[1]


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 8]).mean()


def patched(model: HookedMoE, tokens: Tensor, cache: ActivationCache, name: str, where: tuple[int | slice, ...]) -> float:
    def patch(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[(slice(None), *where)] = cache[name][(slice(None), *where)]
        return x

    return metric(model.run_with_hooks(tokens, fwd_hooks=[(name, patch)])).item()


def by_loop(model: HookedMoE, tokens: Tensor, cache: ActivationCache, activation: str, axes: str) -> Tensor:
    """Every cell of the table, one forward each. `axes`: p for a position, h for a head, a for all positions."""
    sizes = {"p": POS, "h": cache[f"blocks.0.{activation}"].shape[2 if axes[0] in "pa" else 1]}
    results = torch.zeros(model.cfg.n_layers, *(sizes[axis] for axis in axes if axis != "a"))
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in results.shape)).tolist():
        layer, *index = cell
        indices = iter(index)
        where = tuple(slice(None) if axis == "a" else next(indices) for axis in axes)
        results[tuple(cell)] = patched(model, tokens, cache, f"blocks.{layer}.{activation}", where)
    return results


@EVERY_ARCHITECTURE
def test_the_model_meets_the_protocols(model: HookedMoE) -> None:
    assert isinstance(model, protocol.TransformerLensModel)
    assert isinstance(model, protocol.TrainableTransformerLensModel)
    assert isinstance(model, protocol.TransformerLensModelWithWeights)


@GRADIENTS
@pytest.mark.parametrize(
    ("patch", "activation", "axes"),
    [
        ("resid_pre", "hook_resid_pre", "p"),
        ("resid_mid", "hook_resid_mid", "p"),
        ("attn_out", "hook_attn_out", "p"),
        ("mlp_out", "hook_mlp_out", "p"),
        ("attn_head_out_all_pos", "attn.hook_z", "ah"),
        ("attn_head_q_all_pos", "attn.hook_q", "ah"),
        ("attn_head_k_all_pos", "attn.hook_k", "ah"),
        ("attn_head_v_all_pos", "attn.hook_v", "ah"),
        ("attn_head_q_by_pos", "attn.hook_q", "ph"),
        ("attn_head_k_by_pos", "attn.hook_k", "ph"),
        ("attn_head_v_by_pos", "attn.hook_v", "ph"),
        ("attn_head_out_by_pos", "attn.hook_z", "ph"),
        ("attn_head_pattern_all_pos", "attn.hook_pattern", "h"),
        ("attn_head_pattern_by_pos", "attn.hook_pattern", "hp"),
        ("attn_head_pattern_dest_src_pos", "attn.hook_pattern", "hpp"),
    ],
)
def test_a_patching_table_is_that_of_a_loop(
    patch: str, activation: str, axes: str, gradients: bool, model: HookedMoE, corrupted: Tensor, cache: ActivationCache
) -> None:
    with torch.set_grad_enabled(gradients):
        table = getattr(patching, f"get_act_patch_{patch}")(model, corrupted, cache, metric)
    with torch.no_grad():
        expected = by_loop(model, corrupted, cache, activation, axes)
        unpatched = metric(model(corrupted)).item()
    torch.testing.assert_close(table, expected, atol=1e-6, rtol=1e-5)
    assert (table - unpatched).abs().max() > 1e-4


@pytest.mark.parametrize(("architecture", "gradients"), [("olmoe", False), ("olmoe", True), ("deepseek", False)])
def test_every_block_part_is_patched_at_once(
    gradients: bool, model: HookedMoE, corrupted: Tensor, clean: Tensor, cache: ActivationCache
) -> None:
    with torch.set_grad_enabled(gradients):
        table = patching.get_act_patch_block_every(model, corrupted, cache, metric)
    with torch.no_grad():
        parts = [by_loop(model, corrupted, cache, f"hook_{part}", "p") for part in ("resid_pre", "attn_out", "mlp_out")]
        restored = metric(model(clean)).item()
    torch.testing.assert_close(table, torch.stack(parts), atol=1e-6, rtol=1e-5)
    assert table[0, 0, 0].item() == pytest.approx(restored, abs=1e-5)  # the first token is all that differs


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek"])
def test_every_part_of_every_head_is_patched_with_grouped_key_value_heads_and_narrow_values(
    model: HookedMoE, corrupted: Tensor, cache: ActivationCache
) -> None:
    with torch.no_grad():
        table = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, metric)
        expected = {
            0: by_loop(model, corrupted, cache, "attn.hook_z", "ah"),
            1: by_loop(model, corrupted, cache, "attn.hook_q", "ah"),
            2: by_loop(model, corrupted, cache, "attn.hook_k", "ah"),
            3: by_loop(model, corrupted, cache, "attn.hook_v", "ah"),
            4: by_loop(model, corrupted, cache, "attn.hook_pattern", "h"),
        }
    for part, values in expected.items():
        torch.testing.assert_close(table[part, :, : values.shape[1]], values, atol=1e-6, rtol=1e-5)


def test_their_cache_class_holds_our_activations(model: HookedMoE, clean: Tensor, corrupted: Tensor) -> None:
    """For code that insists on it."""
    _, ours = model.run_with_cache(clean)
    theirs = transformer_lens.ActivationCache(dict(ours), model)
    for key in ("hook_embed", ("resid_pre", 1), ("pattern", 2), ("z", 0), ("scale", 1, "ln2")):
        assert torch.equal(theirs[key], ours[key])
    with torch.no_grad():
        tables = [patching.get_act_patch_resid_pre(model, corrupted, cache, metric) for cache in (ours, theirs)]
    assert torch.equal(*tables)


def test_every_part_of_every_head_is_patched_by_position(model: HookedMoE, corrupted: Tensor, cache: ActivationCache) -> None:
    with torch.no_grad():
        table = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, metric)
        parts = {0: "hook_z", 1: "hook_q", 2: "hook_k", 3: "hook_v"}
        expected = {part: by_loop(model, corrupted, cache, f"attn.{name}", "ph") for part, name in parts.items()}
    for part, values in expected.items():
        torch.testing.assert_close(table[part, :, :, : values.shape[-1]], values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_per_example_results_come_with_a_baseline(
    reduce: str, model: HookedMoE, corrupted: Tensor, cache: ActivationCache
) -> None:
    per_example: Callable[[Tensor], Tensor] = lambda logits: logits[:, -1, 3]  # noqa: E731
    with torch.no_grad():
        result = patching.get_act_patch_mlp_out(model, corrupted, cache, per_example, reduce=reduce, baseline=True)
        baseline = per_example(model(corrupted))
    torch.testing.assert_close(result.baseline, baseline if reduce == "none" else baseline.mean())
    assert result.effect().abs().max() > 1e-4


# transformer_lens.tools.analysis


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("unit", ["component", "head", "layer"])
def test_direct_logit_attribution_sums_to_the_difference_of_logits(unit: str, model: HookedMoE, tokens: Tensor) -> None:
    answers, others = torch.tensor([3, 8]), torch.tensor([4, 1])
    result = analysis.direct_logit_attribution(model, tokens, answers, others, unit=unit)
    logits = model(tokens)[:, -1]
    expected = logits.gather(-1, answers[:, None]) - logits.gather(-1, others[:, None])
    terms = result.attribution if unit != "layer" else result.attribution[-1:]  # a layer's is of the whole stream so far
    torch.testing.assert_close(terms.sum(0)[:, None], expected, atol=1e-5, rtol=1e-4)
    everywhere = analysis.direct_logit_attribution(model, tokens, 3, unit=unit, pos=None).attribution
    total = (everywhere if unit != "layer" else everywhere[-1:]).sum(0)
    torch.testing.assert_close(total, model(tokens)[..., 3], atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_attribution_of_experts_sums_to_that_of_their_layer(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    stack, labels = cache.decompose_resid(expand_experts=True, pos_slice=-1, return_labels=True)
    experts = cache.logit_attrs(stack, 3, 4, pos_slice=-1)
    blocks = analysis.direct_logit_attribution(model, answer_tokens=3, incorrect_tokens=4, cache=cache)
    for label, value in zip(blocks.labels, blocks.attribution, strict=True):
        prefixes = (f"L{label[0]}",) if label.endswith("mlp_out") else (label,)
        rows = [row for row, name in enumerate(labels) if name.startswith(prefixes)]
        torch.testing.assert_close(experts[rows].sum(0), value, atol=1e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_their_logit_lens_ends_in_the_logits(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        result = analysis.logit_lens(model, tokens, incl_mid=True)
    assert result.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    torch.testing.assert_close(result.values[-1], model(tokens)[:, -1])
    torch.testing.assert_close(result.values[2], model.logits(model(tokens, stop_at_layer=1))[:, -1])


@EVERY_ARCHITECTURE
def test_attribution_patching_is_the_first_order_of_a_patch(model: HookedMoE, clean: Tensor, corrupted: Tensor) -> None:
    """Its scores are the derivative along the patch, here taken by finite differences through hooks; in float64."""
    model = copy.deepcopy(model).double()
    scores = analysis.attribution_patch(model, clean[:1], corrupted[:1], metric).node_scores
    _, cache = model.run_with_cache(clean[:1])
    assert len(scores) == POS * (1 + 3 * (model.cfg.n_heads + 1))
    for node, score in scores.items():

        def towards_clean(x: Tensor, hook: HookPoint, step: float, node: Any = node) -> Tensor:
            change = torch.zeros_like(x)
            place = (0, node.position) if node.head is None else (0, node.position, node.head)
            change[place] = cache[hook.name][place] - x[place]
            return x + step * change

        with torch.no_grad():
            up, down = (
                metric(
                    model.run_with_hooks(corrupted[:1], fwd_hooks=[(node.hook_name, functools.partial(towards_clean, step=step))])
                )
                for step in (1e-6, -1e-6)
            )
        assert score == pytest.approx(float((up - down) / 2e-6), abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken_apart_with_padding(family: str) -> None:
    """The published architectures; rows of unequal length, padded on the left."""
    model, tokens = pair_of(f"{family}-plain").ours, random_tokens(batch=2, pos=9)
    mask = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    answers, others = torch.tensor([3, 8]), torch.tensor([4, 1])
    expected = logits[[0, 1], -1, answers] - logits[[0, 1], -1, others]
    for unit in ("component", "head"):
        result = analysis.direct_logit_attribution(model, answer_tokens=answers, incorrect_tokens=others, unit=unit, cache=cache)
        torch.testing.assert_close(result.attribution.sum(0), expected, atol=1e-5, rtol=1e-4)
    full = cache.get_full_resid_decomposition(pos_slice=-1)
    torch.testing.assert_close(cache.logit_attrs(full, answers, others, pos_slice=-1).sum(0), expected, atol=1e-5, rtol=1e-4)
    lens = analysis.logit_lens(model, cache=cache, positions=None)
    torch.testing.assert_close(lens.values[-1], logits, atol=1e-5, rtol=1e-4)
    assert analysis.attribution_patch(model, tokens[1:], (tokens[1:] + 5) % 97, metric).node_scores
    with torch.no_grad():
        table = patching.get_act_patch_resid_pre(
            model, (tokens[1:, :4] + 5) % 97, model.run_with_cache(tokens[1:, :4])[1], metric
        )
    assert table.isfinite().all()
