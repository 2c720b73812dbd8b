"""The parts, each against a slower or another's version of itself."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, OlmoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, OlmoeRotaryEmbedding, apply_rotary_pos_emb

from hooked_moe import ActivationCache, HookedMoE, HookedMoEConfig
from hooked_moe.components.attention import QueriesKeysValues
from hooked_moe.components.experts import ExpertGroups
from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import RMSNorm
from hooked_moe.components.rotary import rotation
from hooked_moe.components.router import Router
from hooked_moe.config import ClampedSwiGLU, YarnScaling
from hooked_moe.hooks.hook_point import keep_unedited_bits
from hooked_moe.kernels import routing
from hooked_moe.kernels.cpu import few_rows
from hooked_moe.kernels.cpu import grouped_matmul as kernel
from hooked_moe.kernels.routing import RoutingRule
from hooked_moe.kernels.swiglu import swiglu
from hooked_moe.kernels.weighted_sum import weighted_sum, weighted_sum_reference
from tests.conftest import EVERY_ARCHITECTURE, random_config, random_model

# Grouped products

shapes = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 9), min_size=1, max_size=7),
        "d_in": st.integers(1, 20),
        "d_out": st.integers(1, 20),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "seed": st.integers(0, 1000),
    }
)
ALL_EMPTY = {"counts": [0, 0], "d_in": 8, "d_out": 4, "dtype": torch.float32, "seed": 0}
ONE_EMPTY = {"counts": [3, 0, 2, 0], "d_in": 8, "d_out": 5, "dtype": torch.float32, "seed": 0}
UNALIGNED = {"counts": [2, 5], "d_in": 7, "d_out": 3, "dtype": torch.float32, "seed": 0}


def grouped_inputs(counts: list[int], d_in: int, d_out: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), d_in, generator=generator, dtype=dtype)
    weight = torch.randn(len(counts), d_out, d_in, generator=generator, dtype=dtype)
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


@settings(max_examples=60, deadline=None)
@given(shapes)
@example(ALL_EMPTY)
@example(ONE_EMPTY)
@example(UNALIGNED)
def test_a_grouped_product_is_one_product_per_expert(shape: dict[str, Any]) -> None:
    x, weight, ends = grouped_inputs(**shape)
    owner = torch.arange(len(ends)).repeat_interleave(torch.tensor(shape["counts"]))
    expected = torch.einsum("noi,ni->no", weight[owner], x)
    for product in (kernel.grouped_matmul, kernel.grouped_matmul_loop):
        torch.testing.assert_close(product(x, weight, ends), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes)
@example(ALL_EMPTY)
@example(ONE_EMPTY)
def test_a_grouped_product_has_the_gradients_of_the_loop(shape: dict[str, Any]) -> None:
    results = []
    for product in (kernel.grouped_matmul, kernel.grouped_matmul_loop):
        x, weight, ends = grouped_inputs(**shape)
        x.requires_grad_()
        weight.requires_grad_()
        results.append(torch.autograd.grad(product(x, weight, ends).square().sum(), (x, weight)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_grouped_product_of_half_precision_rounds_only_the_result(dtype: torch.dtype) -> None:
    x, weight, ends = (t.to(dtype) if t.is_floating_point() else t for t in grouped_inputs([4, 0, 6], 16, 8, torch.float32, 0))
    expected = kernel.grouped_matmul_loop(x.double(), weight.double(), ends)
    torch.testing.assert_close(kernel.grouped_matmul(x, weight, ends).double(), expected, atol=0.02, rtol=0.02)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 100), st.sampled_from([5, 300]))
def test_sorting_by_expert_and_back_is_lossless(batch: int, pos: int, k: int, seed: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, num_experts, (batch, pos, k), generator=generator)
    groups = ExpertGroups(indices, num_experts)
    x = torch.randn(batch, pos, 3, generator=generator)
    sorted_rows = groups.gather(x)
    owners = groups.to_sorted(indices[..., None].float())[:, 0].long()
    assert torch.equal(owners, indices.flatten().sort().values)
    assert groups.ends.tolist() == [int((indices <= e).sum()) for e in range(num_experts)]
    assert torch.equal(groups.to_slots(sorted_rows), x[:, :, None].expand(-1, -1, k, -1))
    assert torch.equal(groups.to_sorted(groups.to_slots(sorted_rows)), sorted_rows)
    where = groups.tokens()
    assert torch.equal(x[where[:, 0], where[:, 1]], sorted_rows)
    flat = where[:, 0] * pos + where[:, 1]
    for expert in owners.unique():
        mine = flat[owners == expert]
        assert torch.equal(mine, mine.sort().values)


sums = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@settings(max_examples=20, deadline=None)
@given(sums)
def test_a_weighted_sum_of_rows_is_its_definition(dtype: torch.dtype, shape: tuple[list[int], int, int, int]) -> None:
    token, k, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(11, width, generator=generator).to(dtype)
    place = torch.randint(0, 11, (*token, k), generator=generator)
    weights = torch.randn(*token, k, generator=generator).to(dtype)
    tolerance = 20 * torch.finfo(dtype).eps
    expected = weighted_sum_reference(rows.double(), place, weights.double())
    torch.testing.assert_close(weighted_sum(rows, place, weights).double(), expected, atol=tolerance, rtol=tolerance)

    order = torch.randperm(11, generator=generator)
    assert torch.equal(weighted_sum(rows[order], order.argsort()[place], weights), weighted_sum(rows, place, weights))


@settings(max_examples=20, deadline=None)
@given(sums)
def test_a_weighted_sum_has_the_gradients_of_its_definition(shape: tuple[list[int], int, int, int]) -> None:
    token, k, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(11, width, generator=generator, requires_grad=True)
    weights = torch.randn(*token, k, generator=generator, requires_grad=True)
    place = torch.randint(0, 11, (*token, k), generator=generator)
    fast, slow = (
        torch.autograd.grad(combine(rows, place, weights).square().sum(), (rows, weights))
        for combine in (weighted_sum, weighted_sum_reference)
    )
    for ours, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


# Norm and rotation, against transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype, eps: float) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(24, eps).to(dtype), OlmoeRMSNorm(24, eps=eps).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(ours.w.normal_(1, 0.3))
        x = torch.randn(3, 5, 24, dtype=dtype)
        tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(ours(x), theirs(x), atol=tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers(base: float, dtype: torch.dtype) -> None:
    config = OlmoeConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base})
    torch.manual_seed(0)
    positions = torch.stack((torch.arange(40), torch.arange(100, 140)))
    q, k = torch.randn(2, 40, 4, 16, dtype=dtype), torch.randn(2, 40, 2, 16, dtype=dtype)
    cos, sin = OlmoeRotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotate = rotation(positions, random_config(d_head=16, rotary_base=base, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    for ours, theirs in zip((rotate(q), rotate(k)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    cfg = random_config(d_head=16)

    def product(a: int, b: int) -> Tensor:
        turn = [rotation(torch.tensor([[position]]), cfg) for position in (a, b)]
        return (turn[0](q) * turn[1](k)).sum()

    torch.testing.assert_close(product(7, 3), product(107, 103), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(product(7, 3), product(7, 4))


YARN = {
    "DeepSeek-V2-Lite": YarnScaling(factor=40.0, original_ctx=4096, mscale=0.707, mscale_all_dim=0.707),
    "all in the rotations": YarnScaling(factor=8.0, original_ctx=256),
    "in rotations and scores": YarnScaling(factor=4.0, original_ctx=512, mscale=2.0, mscale_all_dim=0.5),
    "every rotation slow": YarnScaling(factor=4.0, original_ctx=4),
    "every rotation fast": YarnScaling(factor=4.0, original_ctx=500_000),
    "no rotation in between": YarnScaling(factor=4.0, original_ctx=64, beta_fast=2.0, beta_slow=1.9),
    "long ramp": YarnScaling(factor=16.0, original_ctx=2000, beta_fast=100.0, beta_slow=0.1),
    "factor of one": YarnScaling(factor=1.0, original_ctx=64),
    "gpt-oss": YarnScaling(factor=32.0, original_ctx=4096, truncate=False),
    "Kimi-K2": YarnScaling(factor=32.0, original_ctx=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
}
EACH_YARN = pytest.mark.parametrize("yarn", YARN.values(), ids=YARN)


def rotary_configs(yarn: YarnScaling | None) -> tuple[HookedMoEConfig, DeepseekV2Config]:
    """Ours and that of transformers."""
    ours = random_config("deepseek", d_head=28, d_rotary=16, rotary_base=500.0, rotary_scaling=yarn)
    if yarn is None:
        return ours, deepseek_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    values = dataclasses.asdict(yarn)
    scaling = {"original_max_position_embeddings": values.pop("original_ctx"), **values}
    return ours, deepseek_config(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **scaling})


def deepseek_config(**options: Any) -> DeepseekV2Config:
    return DeepseekV2Config(hidden_size=32, qk_nope_head_dim=12, qk_rope_head_dim=16, **options)


@pytest.mark.parametrize("yarn", [None, YARN["in rotations and scores"]], ids=["plain", "yarn"])
def test_interleaved_rotation_is_that_of_transformers(yarn: YarnScaling | None) -> None:
    torch.manual_seed(0)
    cfg, config = rotary_configs(yarn)
    positions = torch.stack((torch.arange(40), torch.arange(1000, 1040)))
    q, k = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 1, 16)
    frequencies = deepseek.DeepseekV2RotaryEmbedding(config)(q, positions)
    expected = deepseek.apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), frequencies)
    rotate = rotation(positions, cfg)
    for ours, theirs in zip((rotate(q), rotate(k)), expected, strict=True):
        torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-4, rtol=1e-5)


@EACH_YARN
def test_yarn_slows_down_the_rotations_that_transformers_slows_down(yarn: YarnScaling) -> None:
    cfg, config = rotary_configs(yarn)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    second = rotation(torch.tensor([[1]]), cfg)
    torch.testing.assert_close(torch.atan2(second.sin, second.cos).flatten(), expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(second.cos.square() + second.sin.square(), torch.full_like(second.cos, scale**2))


@EACH_YARN
def test_scores_are_scaled_as_in_transformers(yarn: YarnScaling) -> None:
    cfg, config = rotary_configs(yarn)
    assert cfg.attention_scale == pytest.approx(deepseek.DeepseekV2Attention(config, layer_idx=0).scaling)
    assert cfg.replace(rotary_scaling=None).attention_scale == pytest.approx(28**-0.5)


# Router and MLP, against transformers


@pytest.mark.parametrize(("groups", "groups_per_token"), [(1, 1), (2, 1), (4, 2), (4, 3), (12, 5)])
def test_routing_within_groups_is_that_of_transformers(groups: int, groups_per_token: int, tokens: Tensor) -> None:
    config = deepseek_config(
        n_routed_experts=12,
        num_experts_per_tok=4,
        topk_method="group_limited_greedy",
        n_group=groups,
        topk_group=groups_per_token,
        routed_scaling_factor=2.5,
    )
    cfg = random_config(
        num_experts=12,
        experts_per_token=4,
        n_expert_groups=groups,
        groups_per_token=groups_per_token,
        routed_scaling_factor=2.5,
    )
    torch.manual_seed(0)
    ours, theirs = Router(cfg, 12), deepseek.DeepseekV2TopkRouter(config)
    x = torch.randn(*tokens.shape, 32)
    with torch.no_grad():
        theirs.weight.copy_(ours.W.normal_())
        logits, weights, indices = theirs(x)
        scores = routing.score(ours(x), ours.rule)
        chosen = routing.select(scores, ours.rule)
    weights, order = weights.sort(dim=-1, descending=True)  # theirs are in no order
    torch.testing.assert_close(ours(x).flatten(0, 1), logits)
    assert torch.equal(chosen.flatten(0, 1), indices.gather(-1, order))
    torch.testing.assert_close(routing.weigh(scores, chosen, ours.rule).flatten(0, 1), weights)


@pytest.mark.parametrize(("groups", "groups_per_token"), [(1, 1), (2, 1), (4, 2), (6, 5)])
@pytest.mark.parametrize("offset", [0.0, -1.5, 7.0])
def test_routing_by_sigmoids_and_a_bias_is_that_of_transformers(
    groups: int, groups_per_token: int, offset: float, tokens: Tensor
) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=12,
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=groups_per_token,
        routed_scaling_factor=2.5,
    )
    cfg = random_config(
        "glm",
        num_experts=12,
        experts_per_token=2,
        n_expert_groups=groups,
        groups_per_token=groups_per_token,
        routed_scaling_factor=2.5,
    )
    torch.manual_seed(0)
    ours, theirs = Router(cfg, 12), deepseek_v3.DeepseekV3TopkRouter(config)
    x = torch.randn(*tokens.shape, 32)
    with torch.no_grad():
        theirs.weight.copy_(ours.W.normal_())
        theirs.e_score_correction_bias.copy_(ours.b_selection.normal_(offset, 0.2))
        _, weights, indices = theirs(x)
        scores = routing.score(ours(x), ours.rule)
        chosen = routing.select(scores, ours.rule, None, ours.b_selection)
    order = weights.argsort(dim=-1, descending=True)  # theirs are in no order
    assert torch.equal(chosen.flatten(0, 1), indices.gather(-1, order))
    torch.testing.assert_close(routing.weigh(scores, chosen, ours.rule).flatten(0, 1), weights.gather(-1, order))


def test_a_softmax_over_the_chosen_is_that_over_all_rescaled() -> None:
    """gpt-oss's rule is that of Mixtral, with a bias of the logits."""
    torch.manual_seed(0)
    logits, rule = 4 * torch.randn(50, 12), RoutingRule(4, renormalize=True)
    top = logits.topk(4, dim=-1)
    weights, indices = routing.route_reference(logits, rule)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(weights, top.values.softmax(-1))


def test_scores_that_are_all_small_are_rescaled_as_in_transformers() -> None:
    rule = RoutingRule(2, renormalize=True, score="sigmoid")
    weights, _ = routing.route_reference(torch.tensor([[-50.0, -46.0, -48.0]]), rule)
    small = torch.tensor([-46.0, -48.0]).sigmoid()
    torch.testing.assert_close(weights[0], small / (small.sum() + 1e-20))
    assert weights.sum() < 0.999


@pytest.mark.parametrize("rule", [RoutingRule(3, score="sigmoid"), RoutingRule(3, True, 1.0, 4, 2, "sigmoid", "top2")], ids=str)
def test_a_removed_expert_gives_its_slot_to_the_next_whatever_its_bias(rule: RoutingRule) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(40, 12), torch.randn(12) - 1
    bias[5] = 30.0  # always chosen, until it is removed
    keep = torch.ones(40, 12, dtype=torch.bool)
    keep[:, 5] = False
    _, before = routing.route_reference(logits, rule, None, bias)
    weights, after = routing.route_reference(logits, rule, keep, bias)
    assert (before == 5).any(-1).all()
    assert not (after == 5).any()
    assert (weights > 0).all()
    if rule.groups == 1:
        next_best = (logits.sigmoid() + bias).masked_fill(~keep, -torch.inf).topk(3, dim=-1).indices
        assert torch.equal(after.sort().values, next_best.sort().values)


def test_the_selection_bias_stays_in_float32(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model("glm", dtype=torch.bfloat16)
    bias = model.blocks[1].mlp.router.b_selection
    with torch.no_grad():
        bias.fill_(7.0001)
    assert bias.dtype == torch.float32
    assert not bias.requires_grad
    half = model.half().to(torch.bfloat16)
    assert torch.equal(half.blocks[1].mlp.router.b_selection, torch.full((6,), 7.0001))
    assert half.blocks[1].mlp.router.W.dtype == torch.bfloat16
    assert model.double().blocks[1].mlp.router.b_selection.dtype == torch.float64
    assert copy.deepcopy(model).float().blocks[1].mlp.router.b_selection.dtype == torch.float32


CLAMP = ClampedSwiGLU(limit=7.0, alpha=1.702)


@pytest.mark.parametrize(
    ("gate", "up", "g", "u"),
    [(1.0, 2.0, 1.0, 2.0), (9.0, 2.0, 7.0, 2.0), (-9.0, 2.0, -9.0, 2.0), (1.0, 9.0, 1.0, 7.0), (1.0, -9.0, 1.0, -7.0)],
)
def test_the_gate_is_clamped_above_and_the_up_projection_on_both_sides(gate: float, up: float, g: float, u: float) -> None:
    expected = (u + 1) * g / (1 + math.exp(-1.702 * g))
    assert swiglu(torch.tensor([[gate, up]]), CLAMP).item() == pytest.approx(expected, rel=1e-6)


def test_a_gated_mlp_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    ours, theirs = GatedMLP(32, 20), deepseek.DeepseekV2MLP(deepseek_config(intermediate_size=20))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        for weight, linear in [(ours.W_gate, theirs.gate_proj), (ours.W_in, theirs.up_proj), (ours.W_out, theirs.down_proj)]:
            linear.weight.copy_(weight.normal_())
        torch.testing.assert_close(ours(x), theirs(x))


# Attention: the fused kernel and the pattern spelled out


def test_unedited_rows_keep_the_fused_bits_and_edited_ones_do_not() -> None:
    torch.manual_seed(0)
    fused = torch.randn(4, 3)
    spelled = (fused + 1e-6).requires_grad_()
    same = torch.tensor([True, False, True, False])[:, None]
    out = keep_unedited_bits(spelled, fused, same)
    assert torch.equal(out[0], fused[0])
    assert torch.equal(out[1], spelled[1])
    (gradient,) = torch.autograd.grad(out.sum(), spelled)
    assert torch.equal(gradient, torch.ones_like(spelled))


@EVERY_ARCHITECTURE
def test_attention_is_the_softmax_it_says_it_is(model: HookedMoE, tokens: Tensor) -> None:
    """Queries, keys and values as cached, mixed by the textbook formula, one head at a time."""
    mask = torch.ones_like(tokens)
    mask[0, :3], mask[1, 8:] = 0, 0
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    for layer in range(model.cfg.n_layers):
        q, k, z, pattern = (cache[name, layer, "attn"] for name in ("rot_q", "rot_k", "z", "pattern"))
        v = used_values(model, cache, layer)
        for b, p, h in [(0, 3, 0), (0, 10, 1), (1, 0, 2), (1, 7, 3)]:
            seen = [j for j in range(p + 1) if mask[b, j]][-(model.cfg.window_of(layer) or 11) :]
            scores = k[b, seen, h // group] @ q[b, p, h] * model.cfg.attention_scale
            sink = model.blocks[layer].attn.sink
            beside = scores.new_full((1,), -torch.inf) if sink is None else sink[h, None]
            weights = torch.cat((scores, beside)).softmax(0)[:-1]
            torch.testing.assert_close(pattern[b, h, p, seen], weights, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(z[b, p, h], weights @ v[b, seen, h // group], atol=1e-6, rtol=1e-5)
            assert pattern[b, h, p].count_nonzero() == len(seen)


def used_values(model: HookedMoE, cache: ActivationCache, layer: int) -> Tensor:
    clip = model.cfg.clip_qkv or torch.inf
    return cache["v", layer].clamp(-clip, clip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ["olmoe", "deepseek", "gpt-oss"])
def test_the_pattern_agrees_with_the_fused_kernel_in_every_dtype(
    architecture: str, dtype: torch.dtype, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    model = make_model(architecture, dtype=dtype)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        z, v = cache["z", 1], used_values(model, cache, 1)
        v = v.repeat_interleave(model.cfg.n_heads // model.cfg.n_key_value_heads, dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], v)
    assert cache["pattern", 1].dtype == dtype
    torch.testing.assert_close(mixed, z, atol=10 * torch.finfo(dtype).eps, rtol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d_value", [5, 14, 18], ids=["narrow", "as wide", "wide"])
def test_values_of_any_width_are_mixed_as_by_the_pattern_gradients_included(d_value: int, masked: bool) -> None:
    attn = random_model("deepseek", n_layers=2, d_value=d_value).blocks[1].attn
    torch.manual_seed(1)
    visible = (torch.rand(2, 1, 6, 6) < 0.6).tril() | torch.eye(6, dtype=torch.bool) if masked else None
    results = []
    for spelled_out in (False, True):
        torch.manual_seed(2)
        q, k, v = (torch.randn(2, 6, 4, width, requires_grad=True) for width in (14, 14, d_value))
        if spelled_out:
            pattern = torch.einsum("bqhe,bkhe->bhqk", q, k) * attn.cfg.attention_scale
            seen = torch.ones(6, 6, dtype=torch.bool).tril() if visible is None else visible
            z = torch.einsum("bhqk,bkhe->bqhe", pattern.masked_fill(~seen, -torch.inf).softmax(-1), v)
        else:
            z = attn.attend(QueriesKeysValues(q, k, v), visible)
        results.append((z, *torch.autograd.grad(z.square().sum(), (q, k, v))))
    for fused, expected in zip(*results, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-4)


# Losses


def test_the_loss_is_cross_entropy_of_the_next_token(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both")
        per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item(), abs=1e-6)
    by_hand = -logits.log_softmax(-1)[0, 4, tokens[0, 5]]
    torch.testing.assert_close(per_token[0, 4], by_hand)
    assert per_token.shape == (2, 10)


# The config


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("olmoe", {"n_layers": 0}, "n_layers must be a positive whole number, not 0"),
        ("olmoe", {"d_model": 3.5}, "d_model must be a positive whole number, not 3.5"),
        ("olmoe", {"n_expert_groups": 0}, "n_expert_groups must be a positive whole number, not 0"),
        ("olmoe", {"d_shared": 0}, "d_shared must be a positive whole number, not 0"),
        ("olmoe", {"n_key_value_heads": 3}, r"n_heads \(4\) must be a multiple of n_key_value_heads \(3\)"),
        ("olmoe", {"d_head": 5}, "d_head must be even.*not 5"),
        ("olmoe", {"experts_per_token": 7}, r"experts_per_token \(7\) cannot exceed num_experts \(6\)"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv must be positive or None, not 0.0"),
        ("olmoe", {"qk_norm": "half"}, "qk_norm must be 'full', 'head' or None, not 'half'"),
        ("olmoe", {"d_rotary": 10}, r"d_rotary \(10\) cannot exceed d_head \(8\)"),
        ("glm", {"router_score": "tanh"}, "router_score must be .softmax. or .sigmoid., not .tanh."),
        ("glm", {"group_score": "sum"}, "group_score must be .max. or .top2., not .sum."),
        ("glm", {"n_expert_groups": 6, "groups_per_token": 5}, "needs two experts in every group"),
        (
            "glm",
            {"sliding_window": None},
            r"sliding_window is the window of windowed layers: got windowed_layers=\(1,\), sliding_window=None",
        ),
        ("glm", {"windowed_layers": (2, 1)}, "windowed_layers must be ascending layers from 0 to 2"),
        ("glm", {"sliding_window": 0}, "sliding_window must be a positive whole number, not 0"),
        ("olmoe", {"q_lora_rank": 4, "d_value": 8}, "q_lora_rank, d_value go with latent attention"),
        ("deepseek", {"d_rotary": 5}, "d_rotary must be even.*not 5"),
        ("deepseek", {"d_rotary": 14}, r"d_rotary \(14\) must be less than d_head \(14\)"),
        ("deepseek", {"d_rotary": None}, r"d_rotary \(None\) must be less than d_head \(14\)"),
        ("deepseek", {"n_key_value_heads": 2}, "latent attention has a key and value head for every query head"),
        ("deepseek", {"qk_norm": "head"}, "and no norm, clipping or bias"),
        ("deepseek", {"clip_qkv": 1.0}, "and no norm, clipping or bias"),
        ("deepseek", {"qkv_bias": True}, "and no norm, clipping or bias"),
        ("qwen", {"dense_layers": (3,)}, r"dense_layers must be ascending layers from 0 to 2, not \(3,\)"),
        ("qwen", {"dense_layers": (2, 0)}, "dense_layers must be ascending layers"),
        ("qwen", {"dense_layers": (0, 1, 2)}, "every layer is dense: there are no experts"),
        ("qwen", {"d_mlp": None}, r"d_mlp is the width of dense layers: got dense_layers=\(1,\), d_mlp=None"),
        ("qwen", {"dense_layers": ()}, r"got dense_layers=\(\), d_mlp=24"),
        ("qwen", {"d_shared": None}, "shared_gate needs shared experts: set d_shared"),
        ("qwen", {"experts_by_layer": (6, 6)}, "experts_by_layer must have 3 entries, not 2"),
        ("qwen", {"experts_by_layer": (6, 6, 6)}, r"layer 1 has 6 experts, and dense_layers are \(1,\)"),
        ("qwen", {"experts_by_layer": (6, 0, 2)}, r"experts_per_token \(3\) cannot exceed num_experts \(2\)"),
        ("deepseek", {"groups_per_token": 4}, r"groups_per_token \(4\) cannot exceed n_expert_groups \(3\)"),
        ("deepseek", {"n_expert_groups": 4}, "4 groups of equal size cannot hold 6 experts"),
        ("deepseek", {"groups_per_token": 1}, r"experts_per_token \(3\) cannot exceed the 2 of a token's groups"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_config_that_describes_no_model_is_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_config(architecture, **changes)


@pytest.mark.parametrize(
    "changes", [{"factor": 0.5}, {"original_ctx": 0}, {"beta_fast": 0.9}, {"beta_slow": 0.0}, {"beta_slow": 40.0}], ids=str
)
def test_a_yarn_scaling_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="factor and original_ctx must be at least 1, and beta_fast >= beta_slow > 0"):
        YarnScaling(**({"factor": 2.0, "original_ctx": 64} | changes))


def test_a_config_names_a_field_it_does_not_have(model: HookedMoE) -> None:
    with pytest.raises(TypeError, match="n_experts"):
        model.cfg.replace(n_experts=4)


@EVERY_ARCHITECTURE
def test_a_new_model_is_initialised_as_transformers_does(architecture: str) -> None:
    torch.manual_seed(0)
    fresh = HookedMoE(random_config(architecture, initializer_range=0.05, d_model=200))
    assert all(block.attn.sink is None or block.attn.sink.std() < 0.2 for block in fresh.blocks)  # too few to say more of them
    for name, parameter in fresh.named_parameters():
        if name.endswith(".w"):
            assert (parameter == 1).all(), name
        elif ".b_" in name:
            assert (parameter == 0).all(), name
        elif not name.endswith(".sink"):
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.01, name


def test_unembedding_half_precision_weights_in_pieces_is_the_whole_product(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model(d_vocab=8192 + 5, dtype=torch.bfloat16)
    with torch.no_grad():
        x = torch.randn(1, 3, model.cfg.d_model)
        torch.testing.assert_close(model.unembed(x), x @ model.unembed.W_U.float().T)


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
@pytest.mark.parametrize("d_expert", [12, 10])  # of 10 values a row is no whole number of 16 bytes
@EVERY_ARCHITECTURE
def test_any_number_of_tokens_runs_under_autocast(
    architecture: str, d_expert: int, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(architecture, d_expert=d_expert).requires_grad_(False)
    for block in model.blocks:
        if stored is not None and isinstance(block.mlp, MoE):
            block.mlp.experts.W_in.data = block.mlp.experts.W_in.to(stored)
            block.mlp.experts.W_out.data = block.mlp.experts.W_out.to(stored)
    for length, smallest in itertools.product((1, 2, 3, 11), (few_rows._LARGE, 1)):
        monkeypatch.setattr(few_rows, "_LARGE", smallest)
        tokens = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens)
        assert (found - model(tokens)).abs().max() < 2.0


@pytest.mark.parametrize("gradients", [True, False])
@EVERY_ARCHITECTURE
def test_router_and_logits_are_in_float32_under_autocast_too(gradients: bool, model: HookedMoE, tokens: Tensor) -> None:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        logits, cache = model.run_with_cache(tokens)
        alone = model(tokens)
    assert {x.dtype for x in (logits, alone, cache["router_logits", 2])} == {torch.float32}
    assert torch.equal(logits, model.logits(cache["resid_post", 2])), "from the last residual stream on as without autocast"
    torch.testing.assert_close(alone, logits, atol=0.1, rtol=0.1)


def test_the_config_says_where_the_model_is_and_in_what_dtype(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model()
    assert model.double().cfg.dtype == torch.float64
    assert model.to(torch.bfloat16).cfg.dtype == torch.bfloat16
    assert model.to("meta").cfg.device.type == "meta"


def test_a_copy_of_a_model_has_hook_points_of_its_own(model: HookedMoE, tokens: Tensor) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(tokens)
        for name in ("blocks.1.hook_mlp_out", "blocks.0.mlp.experts.2.hook_out"):
            with twin.hooks(fwd_hooks=[(name, lambda x, hook: 0 * x)]):
                assert torch.equal(model(tokens), expected)
                assert not torch.equal(twin(tokens), expected)


def test_tied_embeddings_are_one_parameter(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    model = make_model(tie_word_embeddings=True).bfloat16()
    assert model.unembed.W_U is model.embed.W_E
    assert "unembed.W_U" not in dict(model.named_parameters())
