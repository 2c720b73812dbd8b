"""A key/value cache is what the passes that ended well made it: those that fail, or are refused, leave it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE, KeyValueCache
from hooked_moe.components.key_value_cache import LayerCache
from tests.conftest import EVERY_ARCHITECTURE


class Broken(Exception):
    """What a hook raises in these tests."""


def broken(activation: Tensor, hook: Any) -> None:
    raise Broken


def state(cache: KeyValueCache) -> list[Tensor | None]:
    return [cache.real, *(x for layer in cache.layers for x in (layer.keys, layer.values))]


def assert_unchanged(cache: KeyValueCache, before: list[Tensor | None]) -> None:
    assert all(now is then for now, then in zip(state(cache), before, strict=True))


@EVERY_ARCHITECTURE
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("filled", [0, 4])
def test_a_hook_that_fails_anywhere_leaves_the_cache_as_it_was(filled: int, model: HookedMoE, tokens: Tensor) -> None:
    """At every hook point but those that are there to be looked at: of experts, one."""
    with torch.no_grad():
        expected = model(tokens)[:, filled:]
        cache = KeyValueCache(model.cfg.n_layers)
        if filled:
            model(tokens[:, :filled], past_kv_cache=cache)
        before = state(cache)
        served = model.run_with_cache(tokens, names_filter=lambda name: ".experts." in name)[1]
        names = [name for name in model.hook_dict if ".experts." not in name]
        names.append(next(name for name, rows in served.items() if len(rows)))
        for name in names:
            with pytest.raises(Broken):
                model.run_with_hooks(tokens[:, filled:], fwd_hooks=[(name, broken)], past_kv_cache=cache)
            assert_unchanged(cache, before)
        torch.testing.assert_close(model(tokens[:, filled:], past_kv_cache=cache), expected, atol=1e-4, rtol=1e-4)
        assert cache.length == tokens.shape[1]


WRONG = torch.zeros(2, 5, dtype=torch.long)
MASK = ExpertMask({2: torch.ones(7, dtype=torch.bool)})  # of another number of experts: found out in layer 2
REFUSED: dict[str, tuple[Callable[[HookedMoE, KeyValueCache], Any], str]] = {
    "token ids": (lambda m, c: m(WRONG - 1, past_kv_cache=c), "token id -1 is out of range"),
    "mask of another shape": (lambda m, c: m(WRONG, attention_mask=WRONG[:, :3], past_kv_cache=c), "attention_mask has shape"),
    "expert mask": (lambda m, c: m(WRONG, expert_mask=MASK, past_kv_cache=c), "the mask of layer 2 has shape"),
    "no loss of one token": (lambda m, c: m(WRONG[:, :1], "loss", past_kv_cache=c), "at least two tokens"),
    "no loss of padding": (lambda m, c: m(WRONG, "loss", attention_mask=WRONG, past_kv_cache=c), "there is no loss"),
    "part of the layers": (lambda m, c: m(WRONG, stop_at_layer=2, past_kv_cache=c), "leave out start_at_layer"),
    "another number of rows": (lambda m, c: m(WRONG[:1], past_kv_cache=c), r"holds 2 rows, and the input has 1"),
    "too long": (lambda m, c: m(WRONG.repeat(1, 4), past_kv_cache=c), "rows of 20 tokens, and these would have 23"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSED)
def test_a_pass_that_is_refused_leaves_the_cache_as_it_was(refusal: str, model: HookedMoE) -> None:
    run, message = REFUSED[refusal]
    cache = KeyValueCache(model.cfg.n_layers, width=20)
    with torch.no_grad():
        model(torch.ones(2, 3, dtype=torch.long), past_kv_cache=cache)
        before = state(cache)
        with pytest.raises(ValueError, match=message):
            run(model, cache)
    assert_unchanged(cache, before)


@pytest.mark.usefixtures("unchecked")
def test_a_cache_of_another_model_is_refused(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="past_kv_cache is for 2 layers, and the model has 3"):
        model(tokens, past_kv_cache=KeyValueCache(2))
    with pytest.raises(ValueError, match=r"n_layers must be a whole number, not 3.0"):
        KeyValueCache(3.0)  # type: ignore[arg-type]


def rows(length: int, start: float = 0.0) -> Tensor:
    return start + torch.arange(2 * length * 3, dtype=torch.float32).view(2, length, 1, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_caches_that_went_on_from_one_have_each_their_own(mode: Callable[[], Any]) -> None:
    """Two drafts of a cache, and a draft of one of them, in memory that all began with."""
    with mode():
        first = LayerCache()
        first.extend(rows(3), rows(3))
        first.extend(rows(1, 50), rows(1, 60))  # now there is room
        kept = torch.cat((rows(3), rows(1, 50)), dim=1)
        one, other = first.copy(), first.copy()
        seen, _ = one.extend(rows(2, 100), rows(2, 100))
        after_other, _ = other.extend(rows(100, 200), rows(100, 200))
        third = one.copy()
        after_third, _ = third.extend(rows(1, 300), rows(1, 300))
        one.extend(rows(1, 400), rows(1, 400))
    assert torch.equal(first.keys, kept)
    assert torch.equal(seen, torch.cat((kept, rows(2, 100)), dim=1))
    assert torch.equal(after_other, torch.cat((kept, rows(100, 200)), dim=1))
    assert torch.equal(after_third, torch.cat((kept, rows(2, 100), rows(1, 300)), dim=1))
    assert torch.equal(one.keys, torch.cat((kept, rows(2, 100), rows(1, 400)), dim=1))


def test_what_was_kept_in_one_mode_goes_on_in_another() -> None:
    layer = LayerCache()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                layer.extend(rows(1), rows(1))
    assert torch.equal(layer.keys, torch.cat([rows(1)] * 8, dim=1))


def test_no_pass_is_in_the_way_of_another_ones_gradient() -> None:
    layer, keys = LayerCache(), rows(2).requires_grad_()
    seen, _ = layer.extend(keys, rows(2))
    loss = (seen**2).sum()
    with torch.no_grad():
        layer.extend(rows(1), rows(1))
    loss.backward()
    assert torch.equal(keys.grad, 2 * rows(2))


@pytest.mark.usefixtures("unchecked")
def test_tokens_that_were_generated_can_be_trained_on(model: HookedMoE, tokens: Tensor) -> None:
    generated = model.generate(tokens, 3, do_sample=False, stop_at_eos=False, verbose=False)
    model.requires_grad_()(generated, "loss").backward()
    assert model.embed.W_E.grad is not None
    seen: list[Tensor] = []
    with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: seen.append(x))]):
        model.generate(tokens, 1, stop_at_eos=False, verbose=False)
    weight = torch.ones(model.cfg.d_model, requires_grad=True)
    (seen[0] @ weight).sum().backward()  # as a probe does
    assert weight.grad is not None
