"""The model is the one that transformers runs: logits, losses, routing, every named activation, and gradients.

The oracle is a fresh transformers model in float32 with eager attention and eager experts. transformers agrees with itself
(other attention and expert kernels) to 2e-5 in logits and 1e-6 in loss; the tolerances here leave little more.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE, HookedMoEConfig
from hooked_moe.components import experts, grouped_query_attention, rotary
from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.grouped_query_attention import GroupedQueryAttention
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import RMSNorm
from hooked_moe.config import ClampedSwiGLU, YarnScaling
from hooked_moe.hooks.hook_table import declared_names
from hooked_moe.kernels import routing
from hooked_moe.kernels.routing import RoutingRule
from hooked_moe.kernels.swiglu import swiglu
from tests.support.hf_models import CASES, FAMILIES, Pair, hf_activations, pair_of, random_tokens, reference, routing_of
from weights_conversion import CONVERSIONS
from weights_conversion.weight_map import slots_by_parameter

LOGITS, LOSS, TOKEN_LOSS, GRADIENT = 5e-5, 2e-6, 1e-5, 1e-5
PADDING = ("none", "right", "left")


def attention_mask(padding: str, batch: int = 3, pos: int = 20) -> Tensor | None:
    """Rows of 20, 15 and 11 real tokens."""
    if padding == "none":
        return None
    real = torch.arange(pos) < torch.tensor([pos, pos - 5, pos - 9])[:batch, None]
    return (real if padding == "right" else real.flip(1)).long()


def real_tokens(batch: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(batch, dtype=torch.bool) if mask is None else mask.bool()


def labels_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Next tokens to score: no padding, and not the first real token, which only padding could predict."""
    if mask is None:
        return tokens
    predicted_from = F.pad(mask[:, :-1], (1, 0))
    return tokens.masked_fill(~(mask.bool() & predicted_from.bool()), -100)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    shared = pair_of(request.param)
    yield shared
    shared.hf.zero_grad()
    shared.ours.zero_grad()


@pytest.fixture
def plain() -> Pair:
    return pair_of("olmoe-plain")


@pytest.fixture
def batch() -> Tensor:
    return random_tokens(3, 20)


@pytest.mark.parametrize("padding", PADDING)
def test_logits_loss_and_routing_are_those_of_transformers(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    real = real_tokens(batch, mask)
    with torch.no_grad(), routing_of(pair, batch) as routed:
        expected = reference(pair.hf, batch, mask, labels=labels_of(batch, mask))
        (logits, loss), cache = pair.ours.run_with_cache(batch, return_type="both", attention_mask=mask)
    torch.testing.assert_close(logits[real], expected.logits[real], atol=LOGITS, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=LOSS)
    per_token = [token_losses(x, labels_of(batch, mask)) for x in (logits, expected.logits)]
    torch.testing.assert_close(*per_token, atol=TOKEN_LOSS, rtol=0)
    assert routed.keys() == set(pair.ours.cfg.moe_layers)
    for layer, indices in routed.items():
        ours = cache["expert_indices", layer]
        assert torch.equal(ours[real].sort(-1).values, indices[real].sort(-1).values)


# What the matrix would notice


def reconfigured(model: HookedMoE, **changes: Any) -> HookedMoE | None:
    """The same weights under another config; None where there is no such model, or its weights would be others."""
    try:
        other = HookedMoE(model.cfg.replace(**changes)).eval()
    except ValueError:
        return None
    weights, places = dict(model.named_parameters()), dict(other.named_parameters())
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in places.items()}:
        return None
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(weights[name])
    return other


@pytest.mark.parametrize("case", [case for case, (_, option) in CASES.items() if option != "plain"])
def test_every_value_that_an_option_sets_matters(case: str, batch: Tensor) -> None:
    """Put back, one by one and all together, it changes the logits, or else there is no model with these weights."""
    model, plain = pair_of(case).ours, pair_of(f"{CASES[case][0]}-plain").ours
    fields = [field.name for field in dataclasses.fields(model.cfg) if field.name != "model_name"]
    before = {name: getattr(plain.cfg, name) for name in fields if getattr(plain.cfg, name) != getattr(model.cfg, name)}
    assert before
    for changes in (before, *({name: value} for name, value in before.items())):
        other = reconfigured(model, **changes)
        with torch.no_grad():
            assert other is None or (other(batch) - model(batch)).abs().max() > 100 * LOGITS, changes


Mistake = Callable[[HookedMoE, pytest.MonkeyPatch], HookedMoE]


def configured(**changes: Any) -> Mistake:
    """Another value in the config."""

    def mistake(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
        other = reconfigured(model, **changes)
        assert other is not None
        return other

    return mistake


def patched(place: Any, name: str, wrong: Any) -> Mistake:
    """Other code."""

    def mistake(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
        patch.setattr(place, name, wrong)
        return model

    return mistake


def edited(pattern: str, edit: Callable[[Tensor, HookedMoEConfig], Tensor]) -> Mistake:
    """Other weights. `pattern` matches the whole names of those that are edited."""

    def mistake(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
        other = copy.deepcopy(model)
        places = [place for name, place in other.named_parameters() if re.fullmatch(pattern, name)]
        assert places
        with torch.no_grad():
            for place in places:
                place.copy_(edit(place, model.cfg))
        return other

    return mistake


_frequencies = rotary._frequencies
UNROUNDED = SimpleNamespace(**vars(math) | {"floor": float, "ceil": float})


def all_slowed(width: int, base: float, yarn: YarnScaling, device: torch.device) -> Tensor:
    return _frequencies(width, base, None, device) / yarn.factor


def none_slowed(width: int, base: float, yarn: YarnScaling, device: torch.device) -> Tensor:
    return _frequencies(width, base, None, device)


def per_head(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w.view(-1, x.shape[-1])


def over_all_heads(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.square().mean((-2, -1), keepdim=True) + norm.eps).sqrt() * norm.w


def with_eps_of_the_others(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
    for block in model.blocks:
        patch.setattr(block.attn.kv_norm, "eps", model.cfg.eps)
    return model


def by_sum(scores: Tensor, rule: RoutingRule) -> Tensor:
    groups = scores.unflatten(-1, (rule.groups, -1))
    total = groups.sum(dim=-1, keepdim=True)
    least = total.topk(rule.groups_kept, dim=-2).values.amin(dim=-2, keepdim=True)
    return groups.masked_fill(total < least, 0.0).flatten(-2)


def swapped_in_gated_mlps(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
    other = copy.deepcopy(model)
    for mlp in (module for module in other.modules() if isinstance(module, GatedMLP)):
        mlp.W_gate, mlp.W_in = mlp.W_in, mlp.W_gate
    return other


def hooked(**edits: Callable[[Tensor, Any], Tensor]) -> Mistake:
    """Other activations: edits, given the router, by the ends of hook points' names."""

    def mistake(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
        other = copy.deepcopy(model)
        for layer in other.cfg.moe_layers:
            router = other.blocks[layer].mlp.router
            for name, edit in edits.items():
                other.add_hook(f"blocks.{layer}.mlp.{name}", lambda x, hook, e=edit, r=router: e(x, r))
        return other

    return mistake


def plus_bias(x: Tensor, router: Any) -> Tensor:
    return x + router.b_selection


def nothing(x: Tensor, router: Any) -> Tensor:
    return torch.zeros_like(x)


def without(*names: str) -> Mistake:
    """Attention without some of its parts."""

    def mistake(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
        other = copy.deepcopy(model)
        for block in other.blocks:
            for name in names:
                assert getattr(block.attn, name) is not None
                setattr(block.attn, name, None)
        return other

    return mistake


def latents_as_they_are(model: HookedMoE, patch: pytest.MonkeyPatch) -> HookedMoE:
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.attn.q_norm = torch.nn.Identity()
    return other


def zero_outside(choice: Tensor, rule: RoutingRule) -> Tensor:
    kept = _within_best_groups(choice, rule)
    return kept.masked_fill(kept.isinf(), 0.0)


def last_rotated(self: Any, x: Tensor, rotate: Any) -> Tensor:
    width = self.cfg.rotary_width
    return torch.cat((x[..., :-width], rotate(x[..., -width:])), dim=-1)


def over_whole_heads(width: int, base: float, yarn: YarnScaling | None, device: torch.device) -> Tensor:
    return _frequencies(2 * width, base, yarn, device)[: width // 2]


def without_one(gate_and_up: Tensor, clamp: ClampedSwiGLU) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return swiglu(torch.cat((gate, up.clamp(-clamp.limit, clamp.limit) - 1), dim=-1), clamp)


def as_halves(w: Tensor, cfg: HookedMoEConfig) -> Tensor:
    """Gate and up as if they were halves of the columns, where they are in turn."""
    return w.transpose(1, 2).reshape_as(w)


def quartered(w: Tensor, cfg: HookedMoEConfig) -> Tensor:
    return w / 4


_within_best_groups = routing._within_best_groups


def zeroed(w: Tensor, cfg: HookedMoEConfig) -> Tensor:
    return torch.zeros_like(w)


def swapped(w: Tensor, cfg: HookedMoEConfig) -> Tensor:
    return w.flip(1)


def dealt_out(w: Tensor, cfg: HookedMoEConfig) -> Tensor:
    """Heads of queries in the order in which the key/value heads, in turn, would each get their next one."""
    heads = torch.arange(cfg.n_heads).view(cfg.n_key_value_heads, -1).T.flatten()
    return w[heads] if len(w) == cfg.n_heads else w[:, heads]


SIGMOID = ["deepseek_v3-plain", "glm4_moe-plain", "glm4_moe_lite-plain"]
MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "scores without YaRN's temperature": (
        patched(YarnScaling, "score_scale", 1.0),
        ["deepseek_v2-yarn", "deepseek_v2-yarn-in-scores-and-rotations"],
    ),
    "rotations without YaRN's temperature": (
        patched(YarnScaling, "rotation_scale", 1.0),
        ["deepseek_v2-yarn-in-rotations", "deepseek_v2-yarn-in-scores-and-rotations", "qwen3_moe-yarn"],
    ),
    "YaRN slows every pair": (patched(rotary, "_frequencies", all_slowed), ["deepseek_v2-yarn", "qwen3_moe-yarn"]),
    "YaRN slows no pair": (patched(rotary, "_frequencies", none_slowed), ["deepseek_v2-yarn", "qwen3_moe-yarn"]),
    "YaRN's ramp starts within a pair": (patched(rotary, "math", UNROUNDED), ["deepseek_v2-yarn", "qwen3_moe-yarn"]),
    "halves rotated": (configured(rotary_interleaved=False), ["deepseek_v2-plain"]),
    "neighbours rotated": (configured(rotary_interleaved=True), ["olmoe-plain", "mixtral-plain"]),
    "another rotary base": (configured(rotary_base=1e4), ["qwen2_moe-plain", "qwen3_moe-plain", "mixtral-plain"]),
    "scores scaled by the width of values": (patched(HookedMoEConfig, "attention_scale", 12**-0.5), ["deepseek_v2-plain"]),
    "heads of queries dealt out in turn": (edited(r".*attn\.W_[QO]", dealt_out), ["qwen3_moe-plain", "mixtral-plain"]),
    "q, k and v biases dropped": (edited(r".*attn\.b_[QKV]", zeroed), ["olmoe-biased", "qwen2_moe-plain", "qwen3_moe-biased"]),
    "output bias dropped": (edited(r".*attn\.b_O", zeroed), ["olmoe-biased", "qwen3_moe-biased"]),
    "q and k normalised per head": (patched(grouped_query_attention, "_normalised", per_head), ["olmoe-plain"]),
    "q and k normalised over all heads": (patched(grouped_query_attention, "_normalised", over_all_heads), ["qwen3_moe-plain"]),
    "not clipped": (configured(clip_qkv=None), ["olmoe-clipped"]),
    "renormalised": (configured(norm_topk_prob=True), ["olmoe-plain", "qwen2_moe-plain", "deepseek_v2-plain"]),
    "not renormalised": (configured(norm_topk_prob=False), ["qwen3_moe-plain", "mixtral-plain"]),
    "routing weights not scaled": (configured(routed_scaling_factor=1.0), ["deepseek_v2-scaled-routing"]),
    "experts of all groups": (configured(n_expert_groups=1, groups_per_token=1), ["deepseek_v2-group-limited"]),
    "groups by the sum of their experts": (patched(routing, "_within_best_groups", by_sum), ["deepseek_v2-group-limited"]),
    "no shared experts": (patched(MoE, "run_shared", lambda self, x: None), ["qwen2_moe-plain", "deepseek_v2-plain"]),
    "shared expert gated by a half": (edited(r".*W_shared_gate", zeroed), ["qwen2_moe-plain"]),
    "gate and up swapped in experts": (edited(r".*experts\.W_in", swapped), [f"{family}-plain" for family in FAMILIES]),
    "gate and up swapped in dense and shared MLPs": (swapped_in_gated_mlps, ["qwen2_moe-plain", "deepseek_v2-plain"]),
    "norms of latents with the eps of others": (with_eps_of_the_others, ["deepseek_v2-eps"]),
    "another eps": (configured(eps=1e-6), [f"{family}-eps" for family in FAMILIES]),
    "selection bias in the weights": (hooked(hook_router_scores=plus_bias, hook_selection_bias=nothing), SIGMOID),
    "selection bias before the sigmoid": (hooked(hook_router_logits=plus_bias, hook_selection_bias=nothing), SIGMOID),
    "no selection bias": (edited(r".*b_selection", zeroed), SIGMOID),
    "softmax for sigmoid": (hooked(hook_router_scores=lambda x, router: x.logit().softmax(-1)), SIGMOID),
    "groups by their best expert": (configured(group_score="max"), ["deepseek_v3-groups"]),
    "no groups": (configured(n_expert_groups=1, groups_per_token=1), ["glm4_moe-groups"]),
    "zero for experts of other groups": (patched(routing, "_within_best_groups", zero_outside), ["deepseek_v3-groups"]),
    "sigmoids not renormalised": (configured(norm_topk_prob=False), SIGMOID),
    "sigmoids not scaled": (configured(routed_scaling_factor=1.0), ["deepseek_v3-plain", "glm4_moe_lite-plain"]),
    "shared experts dropped": (patched(MoE, "run_shared", lambda self, x: None), SIGMOID),
    "V3's scores without YaRN's temperature": (patched(YarnScaling, "score_scale", 1.0), ["deepseek_v3-yarn"]),
    "V3's halves rotated": (configured(rotary_interleaved=False), ["deepseek_v3-plain", "glm4_moe_lite-plain"]),
    "latent queries not normalised": (latents_as_they_are, ["deepseek_v3-latent-queries", "glm4_moe_lite-plain"]),
    "no norms of heads": (without("q_norm", "k_norm"), ["glm4_moe-key-and-query-norms"]),
    "whole heads rotated": (configured(d_rotary=None), ["glm4_moe-plain"]),
    "the last half of heads rotated": (patched(GroupedQueryAttention, "_rotated", last_rotated), ["glm4_moe-plain"]),
    "frequencies over the whole head": (patched(rotary, "_frequencies", over_whole_heads), ["glm4_moe-plain"]),
    "GLM's neighbours rotated": (configured(rotary_interleaved=True), ["glm4_moe-plain"]),
    "GLM's and gpt-oss's biases dropped": (edited(r".*attn\.b_[QKV]", zeroed), ["glm4_moe-plain", "gpt_oss-plain"]),
    "no sink": (without("sink"), ["gpt_oss-plain"]),
    "sink scaled as scores are": (edited(r".*attn\.sink", quartered), ["gpt_oss-plain"]),
    "a window wider by one": (configured(sliding_window=7), ["gpt_oss-plain", "qwen3_moe-window"]),
    "a window narrower by one": (configured(sliding_window=5), ["gpt_oss-plain", "qwen2_moe-windows-by-number"]),
    "no window": (configured(sliding_window=None, windowed_layers=()), ["gpt_oss-plain", "mixtral-all-at-once"]),
    "windows in all layers": (configured(windowed_layers=(0, 1, 2)), ["gpt_oss-plain"]),
    "windows in the other layers": (configured(windowed_layers=(1,)), ["gpt_oss-plain", "qwen2_moe-windows-by-number"]),
    "softmax before the selection": (configured(norm_topk_prob=False), ["gpt_oss-plain"]),
    "no router bias": (edited(r".*router\.b_logits", zeroed), ["gpt_oss-plain"]),
    "no bias into the experts": (edited(r".*experts\.b_in", zeroed), ["gpt_oss-plain"]),
    "no bias out of the experts": (edited(r".*experts\.b_out", zeroed), ["gpt_oss-plain"]),
    "sigmoid of the gate itself": (configured(clamped_swiglu=ClampedSwiGLU(limit=7.0, alpha=1.0)), ["gpt_oss-plain"]),
    "not clamped": (configured(clamped_swiglu=ClampedSwiGLU(limit=1e3, alpha=1.0)), ["gpt_oss-tight-clamp"]),
    "no one beside the up projection": (patched(experts, "swiglu", without_one), ["gpt_oss-plain"]),
    "gate and up as halves": (edited(r".*experts\.(W|b)_in", as_halves), ["gpt_oss-plain"]),
    "gpt-oss's rotations not scaled": (patched(YarnScaling, "rotation_scale", 1.0), ["gpt_oss-plain"]),
    "gpt-oss's ramp over whole pairs": (
        configured(rotary_scaling=YarnScaling(factor=8.0, original_ctx=256, beta_fast=8.0, beta_slow=2.0)),
        ["gpt_oss-plain"],
    ),
}
"""What is easily wrong in a reimplementation, and the cases that show it."""


@pytest.mark.parametrize(
    ("mistake", "case"),
    [pytest.param(mistake, case, id=f"{name}, {case}") for name, (mistake, cases) in MISTAKES.items() for case in cases],
)
def test_a_mistake_would_be_noticed(mistake: Mistake, case: str, batch: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(case)
    with torch.no_grad():
        expected = reference(pair.hf, batch, labels=batch)
        wrong = mistake(pair.ours, monkeypatch)(batch, return_type="both")
    assert (wrong.logits - expected.logits).abs().max() > 100 * LOGITS
    # Not of the mean: what one token gains, another may lose.
    changes = token_losses(wrong.logits, batch) - token_losses(expected.logits, batch)
    assert changes.abs().mean() > 100 * TOKEN_LOSS


# Named activations


def comparable(activations: Mapping[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """Activations at real tokens, one a row, the slots of a token in the order of its experts.

    transformers leaves the order of slots open: DeepSeek's router selects with `sorted=False`.
    """
    found = {}
    for name, x in activations.items():
        block, _, part = name.rpartition(".mlp.")
        if part.startswith("experts."):
            goes_here = (activations[block + ".mlp.hook_expert_indices"] == int(part.split(".")[1])).any(dim=-1)
            found[name] = x[real[goes_here]]
        elif part.startswith("hook_expert_"):
            order = activations[block + ".mlp.hook_expert_indices"][real].argsort(dim=-1)
            found[name] = torch.stack([slots[at] for slots, at in zip(x[real], order, strict=True)])
        else:
            by_position = name.endswith(("hook_attn_scores", "hook_pattern"))
            found[name] = (x.transpose(1, 2) if by_position else x)[real]
    return found


@pytest.mark.usefixtures("unchecked")  # the forward of the logits above
@pytest.mark.parametrize("padding", PADDING)
def test_named_activations_are_those_of_the_modules_they_are_named_after(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    real = real_tokens(batch, mask)
    with torch.no_grad():
        _, cache = pair.ours.run_with_cache(batch, attention_mask=mask)
    ours, theirs = comparable(cache, real), comparable(hf_activations(pair, batch, mask), real)
    assert theirs.keys() == set(declared_names(pair.ours.cfg))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# Gradients and training


def matched_gradients(pair: Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every gradient of transformers, and ours in its shape. That the names fit is known from the weights, which are equal."""
    cfg, hf = pair.ours.cfg, dict(pair.hf.named_parameters())
    parameters = dict(pair.ours.named_parameters())
    conversion = CONVERSIONS[cfg.model_type]
    for name, slots in slots_by_parameter((*conversion.weights, *conversion.alternatives), cfg, parameters).items():
        for slot in slots:
            if slot.hf_name in hf:
                yield slot.hf_name, slot.as_stored(parameters[name].grad), hf[slot.hf_name].grad


@pytest.mark.parametrize("padding", PADDING)
def test_gradients_are_those_of_transformers(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    reference(pair.hf, batch, mask, labels=labels_of(batch, mask)).loss.backward()
    pair.ours(batch, return_type="loss", attention_mask=mask).backward()
    names, compared = set(), 0
    for name, ours, theirs in matched_gradients(pair):
        names.add(name)
        compared += ours.numel()
        assert theirs.norm() > 0, name
        assert (ours - theirs).norm() <= GRADIENT * theirs.norm(), name
    assert names == set(dict(pair.hf.named_parameters()))
    assert compared == sum(parameter.numel() for parameter in pair.ours.parameters() if parameter.requires_grad)


def test_training_on_one_batch_lowers_the_loss(plain: Pair, batch: Tensor) -> None:
    model = HookedMoE(plain.ours.cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(batch, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(97.0).log().item(), abs=0.2)  # knows nothing at first
    assert losses[-1] < losses[0] / 2


# Other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_as_full_precision_does(plain: Pair, dtype: torch.dtype) -> None:
    tokens = random_tokens(8, 40)
    half = HookedMoE(plain.ours.cfg.replace(dtype=dtype))
    half.load_state_dict(plain.ours.state_dict())
    rounded = HookedMoE(plain.ours.cfg)  # the same weights in float32
    rounded.load_state_dict(half.state_dict())
    with torch.no_grad():
        (logits, loss), cache = half.run_with_cache(tokens, return_type="both")
        expected, full = rounded.run_with_cache(tokens, return_type="loss")
    assert logits.dtype == torch.float32
    assert cache["resid_mid", 1].dtype == dtype
    assert cache["router_logits", 1].dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    for layer in range(half.cfg.n_layers):
        chosen = [F.one_hot(run["expert_indices", layer], half.cfg.num_experts).sum(2) for run in (cache, full)]
        agreement = (chosen[0] * chosen[1]).sum() / chosen[0].sum()
        assert agreement >= 0.98, f"layer {layer}: {agreement:.4f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    """transformers rounds router logits to half precision, where ten random experts often tie; four rarely do."""
    pair, tokens = Pair.of(FAMILIES[family].tiny(num_experts=4, num_experts_per_tok=2), dtype), random_tokens(1, 320)
    layers, noise = pair.ours.cfg.moe_layers, torch.finfo(dtype).eps
    with torch.no_grad(), routing_of(pair, tokens) as theirs:
        expected = reference(pair.hf, tokens, labels=tokens)
        _, cache = pair.ours.run_with_cache(tokens)
        forced = pair.ours.run_with_hooks(
            tokens,
            return_type="both",
            fwd_hooks=[(f"blocks.{i}.mlp.hook_expert_indices", lambda x, hook: theirs[hook.layer()]) for i in layers],
        )
    ours = torch.stack([cache["expert_indices", i].sort(-1).values for i in layers])
    same = (ours == torch.stack([theirs[i].sort(-1).values for i in layers])).all(-1)
    assert same.float().mean() >= 0.98
    assert (forced.loss - expected.loss).abs() < noise / 2
    assert (forced.logits - expected.logits.float()).square().mean().sqrt() < 2 * noise


def test_float64_runs_in_float64(plain: Pair, batch: Tensor) -> None:
    wide = HookedMoE(plain.ours.cfg.replace(dtype=torch.float64))
    wide.load_state_dict(plain.ours.state_dict())
    with torch.no_grad():
        logits, cache = wide.run_with_cache(batch)
        torch.testing.assert_close(logits.float(), plain.ours(batch), atol=LOGITS, rtol=0)
    assert {cache[name].dtype for name in cache if "indices" not in name} | {logits.dtype} == {torch.float64}


# Running a part of the layers


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("case", ["olmoe-plain", "qwen2_moe-all-at-once", "deepseek_v2-all-at-once"])
def test_two_parts_of_the_model_compose_to_the_bit(case: str, layer: int, padding: str, batch: Tensor) -> None:
    model, mask = pair_of(case).ours, attention_mask(padding)
    moe = model.cfg.moe_layers
    expert_mask = ExpertMask.ablate([(moe[0], 1, 4, 2), (moe[-1], None, 7, 5), (moe[1], 0, None, 3)])
    for options in ({}, {"expert_mask": expert_mask}):
        with torch.no_grad():
            whole, cache = model.run_with_cache(batch, attention_mask=mask, return_type="both", loss_per_token=True, **options)
            resid = model(batch, stop_at_layer=layer, attention_mask=mask, **options)
            rest = model(
                resid,
                start_at_layer=layer,
                attention_mask=mask,
                tokens=batch,
                return_type="both",
                loss_per_token=True,
                **options,
            )
        at = layer % 3 if layer != 3 else 3
        before = cache[f"blocks.{at}.hook_resid_pre"] if at < 3 else cache["blocks.2.hook_resid_post"]
        assert torch.equal(resid, before)
        assert torch.equal(rest.logits, whole.logits)
        assert torch.equal(rest.loss.nan_to_num(), whole.loss.nan_to_num())


def test_three_parts_compose_too(plain: Pair, batch: Tensor) -> None:
    model = plain.ours
    with torch.no_grad():
        resid = model(batch, stop_at_layer=1)
        resid = model(resid, start_at_layer=1, stop_at_layer=-1)
        assert torch.equal(model(resid, start_at_layer=-1), model(batch))


# What a forward returns


def test_each_return_type_gives_its_part(plain: Pair, batch: Tensor) -> None:
    model = plain.ours
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(model(batch, return_type="logits"), logits)
        both = model(batch, return_type="both")
        assert torch.equal(both.logits, logits)
        assert torch.equal(both.loss, model(batch, return_type="loss"))
        assert both.loss.shape == ()
        assert model(batch, return_type=None) is None
        per_token = model(batch, return_type="loss", loss_per_token=True)
        assert per_token.shape == (3, 19)
        torch.testing.assert_close(per_token.mean(), both.loss)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_losses_at_padding_are_nan(plain: Pair, padding: str, dtype: torch.dtype, batch: Tensor) -> None:
    mask = attention_mask(padding)
    assert mask is not None
    with torch.no_grad():
        losses = plain.ours(batch, return_type="loss", loss_per_token=True, attention_mask=mask.to(dtype))
        mean = plain.ours(batch, return_type="loss", attention_mask=mask.to(dtype))
        expected = F.cross_entropy(
            plain.ours(batch, attention_mask=mask)[:, :-1].transpose(1, 2), labels_of(batch, mask)[:, 1:], reduction="none"
        )
    scored = labels_of(batch, mask)[:, 1:] != -100
    assert torch.equal(losses.isnan(), ~scored)
    torch.testing.assert_close(losses[scored], expected[scored])
    torch.testing.assert_close(mean, losses[scored].mean())


def test_padding_does_not_matter_to_real_tokens(plain: Pair, batch: Tensor) -> None:
    for padding in ("left", "right"):
        mask = attention_mask(padding)
        assert mask is not None
        with torch.no_grad():
            padded = plain.ours(batch, attention_mask=mask)
            other = plain.ours(torch.where(mask.bool(), batch, 3), attention_mask=mask)
            alone = plain.ours(batch[1:2, mask[1].bool()])
        torch.testing.assert_close(padded[mask.bool()], other[mask.bool()], atol=LOGITS, rtol=0)
        torch.testing.assert_close(padded[1, mask[1].bool()], alone[0], atol=LOGITS, rtol=0)


def test_a_mask_of_ones_changes_no_bit(plain: Pair, batch: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(plain.ours(batch, attention_mask=torch.ones_like(batch)), plain.ours(batch))


# What a forward refuses

Refused = Callable[[HookedMoE, Tensor], Any]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "return type": (lambda m, t: m(t, return_type="logit"), r"return_type must be one of .*'both'.*, not 'logit'"),
    "id too large": (lambda m, t: m(t + 90), r"token id 1\d\d is out of range: .* has ids 0 to 96"),
    "id negative": (lambda m, t: m(t - 97), r"token id -\d+ is out of range"),
    "one dimension": (
        lambda m, t: m(t[0]),
        r"expected token ids as an integer tensor \[batch, pos\], or text, not torch.int64 \[20\]",
    ),
    "floats": (lambda m, t: m(t.float()), r"not torch.float32 \[3, 20\]"),
    "bools": (lambda m, t: m(t.bool()), r"not torch.bool \[3, 20\]"),
    "a number": (lambda m, t: m(3), r"or text, not 3"),
    "no positions": (lambda m, t: m(t[:, :0]), r"no tokens: the input has shape \[3, 0\]"),
    "no rows": (lambda m, t: m(t[:0]), r"no tokens: the input has shape \[0, 20\]"),
    "layer too large": (lambda m, t: m(t, stop_at_layer=4), r"stop_at_layer=4 is out of range: the model has layers 0 to 2"),
    "layer too small": (lambda m, t: m(t, stop_at_layer=-4), r"stop_at_layer=-4 is out of range"),
    "start too large": (lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=9), r"start_at_layer=9 is out of range"),
    "tokens for a residual stream": (lambda m, t: m(t, start_at_layer=1), r"residual stream"),
    "a residual stream of another width": (lambda m, t: m(torch.zeros(3, 20, 63), start_at_layer=1), r"64.*63|63.*64"),
    "loss without tokens": (
        lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=1, return_type="loss"),
        r"a loss from a residual stream needs the tokens too",
    ),
    "mask of another shape": (
        lambda m, t: m(t, attention_mask=torch.zeros(3, 19, dtype=torch.long)),
        r"attention_mask has shape \[3, 19\]; expected \[3, 20\]",
    ),
    "mask of ones of another shape": (
        lambda m, t: m(t, attention_mask=torch.ones(3, 19, dtype=torch.long)),
        r"attention_mask has shape \[3, 19\]; expected \[3, 20\]",
    ),
    "expert mask of a layer that is not there": (
        lambda m, t: m(t, expert_mask=ExpertMask.ablate([(3, 0, 0, 0)])),
        r"expert mask for layer 3: the model has layers 0 to 2",
    ),
    "start after stop": (
        lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=2, stop_at_layer=1),
        r"start_at_layer.*stop_at_layer",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_run_is_refused_by_name(refusal: str, plain: Pair, batch: Tensor, unchecked: None) -> None:
    run, message = REFUSALS[refusal]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        run(plain.ours, batch)


def test_a_loss_of_one_token_is_refused(make_model: Callable[..., HookedMoE]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        make_model()(torch.tensor([[1]]), return_type="loss")


def test_tokens_of_any_integer_type_are_tokens(make_model: Callable[..., HookedMoE]) -> None:
    own, tokens = make_model(), torch.tensor([[1, 2, 3]])
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(own(tokens.to(dtype), return_type="loss"), own(tokens, return_type="loss"))


@pytest.mark.usefixtures("unchecked")
def test_what_goes_with_the_input_has_to_fit_it(make_model: Callable[..., HookedMoE]) -> None:
    own, tokens = make_model(), torch.tensor([[1, 2, 3]])
    resid = own(tokens, stop_at_layer=1)
    with pytest.raises(ValueError, match="the residual stream is of"):
        own(resid, start_at_layer=1, tokens=torch.tensor([[1, 2]]), return_type="loss")
    with pytest.raises(ValueError, match="goes with start_at_layer"):
        own(tokens, tokens=tokens)
    with pytest.raises(ValueError, match="expected token ids as an integer tensor"):
        own([[1, 2, 3]])
    with pytest.raises(TypeError, match="must be an ExpertMask"):
        own(tokens, expert_mask={0: torch.ones(1, 1, 6)})
    with pytest.raises(ValueError, match="no two neighbouring tokens"):
        own(tokens, return_type="loss", attention_mask=torch.tensor([[1, 0, 1]]))
