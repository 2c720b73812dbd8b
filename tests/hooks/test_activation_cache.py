"""The cache: what a run leaves behind, by full and by short names."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ActivationCache, HookedMoE, HookPoint
from hooked_moe.checks import UnknownNameError
from tests.conftest import EVERY_ARCHITECTURE


@pytest.fixture
def cache(model: HookedMoE, tokens: Tensor) -> ActivationCache:
    return model.run_with_cache(tokens)[1]


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (("pattern", 1), "blocks.1.attn.hook_pattern"),
        (("hook_pattern", 1), "blocks.1.attn.hook_pattern"),
        (("z", 0, "attn"), "blocks.0.attn.hook_z"),
        (("scale", 2, "ln2"), "blocks.2.ln2.hook_scale"),
        (("resid_post", 2), "blocks.2.hook_resid_post"),
        (("expert_out", 0), "blocks.0.mlp.hook_expert_out"),
        (("router_logits", 2, "mlp"), "blocks.2.mlp.hook_router_logits"),
        (("pattern", -1), "blocks.2.attn.hook_pattern"),
        (("scale", -3, "ln2"), "blocks.0.ln2.hook_scale"),
    ],
)
def test_short_names_find_the_activation(short: tuple[str | int, ...], full: str, cache: ActivationCache) -> None:
    assert cache[short] is cache[full]


@pytest.mark.parametrize("architecture", ["deepseek"])
@pytest.mark.parametrize(
    ("short", "full"),
    [
        (("kv_latent", 1), "blocks.1.attn.hook_kv_latent"),
        (("pre", 0), "blocks.0.mlp.hook_pre"),
        (("post", 0, "mlp"), "blocks.0.mlp.hook_post"),
        (("pre", 1, "shared"), "blocks.1.mlp.shared.hook_pre"),
        (("post", 1), "blocks.1.mlp.shared.hook_post"),
        (("shared_out", 2), "blocks.2.mlp.hook_shared_out"),
    ],
)
def test_short_names_find_dense_layers_shared_experts_and_latents(
    short: tuple[str | int, ...], full: str, cache: ActivationCache
) -> None:
    assert cache[short] is cache[full]


@pytest.mark.parametrize("architecture", ["deepseek"])
def test_a_dense_layer_has_no_routing_in_the_cache(cache: ActivationCache) -> None:
    with pytest.raises(KeyError, match=r"unknown activation .*router_logits"):
        cache["router_logits", 0]


def test_an_ambiguous_short_name_asks_for_the_part(cache: ActivationCache) -> None:
    with pytest.raises(KeyError, match=r"could be any of .*ln1.hook_scale.*ln2.hook_scale.*name the part too"):
        cache["scale", 1]


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_patern", ("patern", 1), ("pattern", 1, "atn")])
def test_an_unknown_name_suggests_the_nearest(name: str | tuple[str | int, ...], cache: ActivationCache) -> None:
    with pytest.raises(KeyError, match=r"unknown activation .*'blocks.1.attn.hook_pattern'"):
        cache[name]


def test_the_last_layer_is_that_of_the_model_whatever_is_kept(model: HookedMoE, tokens: Tensor) -> None:
    _, some = model.run_with_cache(tokens, names_filter=lambda name: not name.startswith("blocks.2."))
    assert some.to("cpu")["pattern", -2] is some["pattern", 1]
    for cache, short, message in (
        (some, ("pattern", -1), r"unknown activation 'blocks\.2\."),
        (some, ("pattern", -4), r"unknown activation 'blocks\.-1\."),
        (ActivationCache(dict(some)), ("pattern", -1), "does not know how many layers"),
    ):
        with pytest.raises(KeyError, match=message):
            cache[short]


def test_a_layer_is_matched_whole(cache: ActivationCache) -> None:
    twelfth = ActivationCache({"blocks.12.attn.hook_pattern": cache["pattern", 2]})
    assert twelfth["pattern", 12] is cache["pattern", 2]
    with pytest.raises(KeyError):
        twelfth["pattern", 1]


def test_only_what_the_filter_selects_is_kept(model: HookedMoE, tokens: Tensor) -> None:
    for names_filter in (
        "blocks.1.attn.hook_z",
        ["blocks.1.attn.hook_z"],
        lambda name: name == "blocks.1.attn.hook_z",
    ):
        _, cache = model.run_with_cache(tokens, names_filter=names_filter)
        assert list(cache) == ["blocks.1.attn.hook_z"]
    assert list(model.run_with_cache(tokens, names_filter=[])[1]) == []


@EVERY_ARCHITECTURE
def test_activations_are_detached_and_keep_the_order_of_the_computation(cache: ActivationCache) -> None:
    assert not any(x.requires_grad for x in cache.values())
    assert next(iter(cache)) == "hook_embed"
    assert list(cache)[-1] == "ln_final.hook_normalized"


@EVERY_ARCHITECTURE
def test_the_output_is_that_of_the_forward_with_its_options(model: HookedMoE, tokens: Tensor) -> None:
    out, cache = model.run_with_cache(tokens, return_type="loss", loss_per_token=True)
    assert torch.equal(out, model(tokens, return_type="loss", loss_per_token=True))
    resid, cache = model.run_with_cache(tokens, stop_at_layer=1)
    assert torch.equal(resid, cache["blocks.0.hook_resid_post"])
    assert not any(name.startswith(("blocks.1.", "ln_final")) for name in cache)


def test_a_cache_is_a_mapping_that_says_its_size(cache: ActivationCache) -> None:
    assert "hook_embed" in cache
    assert "nothing" not in cache
    assert len(cache) == len(list(cache)) == len(dict(cache))
    assert f"{len(cache)} activations" in repr(cache)


def test_a_cache_moves_between_devices(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, names_filter="hook_embed", device="meta")
    assert cache["hook_embed"].device.type == "meta"
    _, cache = model.run_with_cache(tokens, names_filter="hook_embed")
    assert cache.to("cpu") is cache
    old = weakref.ref(cache["hook_embed"])
    cache.to("meta")  # in place, as TransformerLens has it
    assert old() is None  # and nothing keeps what was there in memory
    assert cache["hook_embed"].device.type == "meta"


def test_a_name_that_stands_in_one_place_needs_no_layer(model: HookedMoE, tokens: Tensor, cache: ActivationCache) -> None:
    assert cache["embed"] is cache["hook_embed"]
    with pytest.raises(KeyError, match=r"'router_logits' is in 3 places; give a layer too, as in cache\['router_logits', 3\]"):
        cache["router_logits"]
    _, one = model.run_with_cache(tokens, names_filter=("router_logits", -1))
    assert list(one) == ["blocks.2.mlp.hook_router_logits"]
    assert torch.equal(one["router_logits"], cache["router_logits", 2])


@pytest.mark.parametrize(
    ("names_filter", "names"),
    [
        ("router_logits", [f"blocks.{layer}.mlp.hook_router_logits" for layer in range(3)]),
        (["embed", ("attn", 1)], ["hook_embed", "blocks.1.attn.hook_pattern"]),
        (("key", "value"), [f"blocks.{layer}.attn.hook_{x}" for layer in range(3) for x in "kv"]),
        (("scale", None, "ln2"), [f"blocks.{layer}.ln2.hook_scale" for layer in range(3)]),
        ([("scale", 0, "ln1"), ("scale", None, "ln_final")], ["blocks.0.ln1.hook_scale", "ln_final.hook_scale"]),
    ],
)
def test_a_filter_takes_short_names(names_filter: Any, names: list[str], model: HookedMoE, tokens: Tensor) -> None:
    assert list(model.run_with_cache(tokens, names_filter=names_filter)[1]) == names


def test_hooks_take_short_names(model: HookedMoE, tokens: Tensor) -> None:
    seen: list[str] = []

    def see(activation: Tensor, hook: HookPoint) -> None:
        seen.append(hook.name)

    model.run_with_hooks(tokens, fwd_hooks=[("resid_mid", see), (("mlp_out", -1), see)])
    assert seen == [f"blocks.{layer}.hook_resid_mid" for layer in range(3)] + ["blocks.2.hook_mlp_out"]
    model.add_hook(("resid_pre", 1), see)
    model(tokens)
    model.reset_hooks()
    assert seen[4:] == ["blocks.1.hook_resid_pre"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("router_logit", r"unknown hook point 'router_logit'; did you mean 'router_logits'.*See model.hook_dict"),
        (("router_logit", 1), r"unknown hook point 'blocks.1.hook_router_logit'; did you mean 'blocks.1.mlp.hook_router_logits'"),
        (("router_logits", 3), r"unknown hook point 'blocks.3.hook_router_logits'"),
        ("scale", r"'scale' could be any of .*blocks.0.ln1.hook_scale.*name the part too, as in \('scale', None, 'ln1'\)"),
        (["resid_pre", ("scale", 1)], r"\('scale', 1\) could be any of .*as in \('scale', 1, 'ln1'\)"),
        (("scale", 1, "ln3"), r"unknown hook point 'blocks.1.ln3.hook_scale'; did you mean 'blocks.1.ln"),
    ],
)
def test_a_wrong_short_name_is_answered(wrong: Any, message: str, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(UnknownNameError, match=message):
        model.run_with_cache(tokens, names_filter=wrong)
    with pytest.raises(UnknownNameError, match=message):
        model.hook_points(wrong)


@EVERY_ARCHITECTURE
def test_what_the_cache_keeps_is_what_hooks_see_that_might_edit_it(model: HookedMoE, tokens: Tensor) -> None:
    # Hooks that only read let the pass go its fused way around the activation; the others make it go through.
    seen: dict[str, Tensor] = {}
    plain = model(tokens)
    logits, cache = model.run_with_cache(tokens)
    hooked = model.run_with_hooks(tokens, fwd_hooks=[(lambda _: True, lambda x, hook: seen.__setitem__(hook.name, x.clone()))])
    assert torch.equal(logits, plain)
    assert torch.equal(hooked, plain)
    assert list(cache) == list(seen)
    for name, activation in cache.items():
        assert torch.equal(activation, seen[name]), name


@pytest.mark.parametrize("point", ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result", "mlp.hook_expert_out"])
def test_an_edit_matters_while_the_cache_is_looking(point: str, model: HookedMoE, tokens: Tensor) -> None:
    edit = (f"blocks.1.{point}", lambda x, hook: 0.5 * x)
    alone = model.run_with_hooks(tokens, fwd_hooks=[edit])
    with model.hooks(fwd_hooks=[edit]):
        watched, cache = model.run_with_cache(tokens)
    assert torch.equal(alone, watched)
    assert not torch.equal(alone, model(tokens))
    assert not torch.equal(cache["resid_post", 1], model.run_with_cache(tokens)[1]["resid_post", 1])
