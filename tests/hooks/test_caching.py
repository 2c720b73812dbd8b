"""What `run_with_cache` keeps: some positions, one row without its batch axis, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.hooks.hook_table import axes_of
from tests.conftest import EVERY_ARCHITECTURE

slices = pytest.importorskip("transformer_lens.utilities")


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("pos_slice", [-1, (2, 5), (0, 9, 3), [4, 1], torch.tensor([0, 3]), slice(None, 2), (3,), None])
def test_positions_are_those_of_the_whole_activation(pos_slice: Any, model: HookedMoE, tokens: Tensor) -> None:
    out, whole = model.run_with_cache(tokens)
    same, part = model.run_with_cache(tokens, pos_slice=pos_slice)
    assert torch.equal(out, same)
    positions = slices.Slice([pos_slice] if isinstance(pos_slice, int) else pos_slice)
    for name, x in part.items():
        pattern = name.endswith(("hook_pattern", "hook_attn_scores"))
        assert torch.equal(x, positions.apply(whole[name], dim=2 if pattern else 1) if axes_of(name)[0] != "n" else whole[name])
    single_experts = {name for name in whole if ".experts." in name}
    assert set(part) == set(whole) - (single_experts if pos_slice is not None else set())


def test_what_is_kept_of_some_positions_does_not_keep_the_others_in_memory(model: HookedMoE, tokens: Tensor) -> None:
    for pos_slice in (-1, (2, 4)):
        for x in model.run_with_cache(tokens, pos_slice=pos_slice)[1].values():
            assert x.untyped_storage().nbytes() == x.nbytes


def test_rows_of_one_expert_have_no_positions(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"pos_slice cannot select from blocks.0.mlp.experts.0.hook_out: .*hook_expert_out has"):
        model.run_with_cache(tokens, names_filter=lambda name: "mlp" in name, pos_slice=-1)
    with pytest.raises(IndexError, match="out of bounds"):
        model.run_with_cache(tokens, pos_slice=11)


@EVERY_ARCHITECTURE
def test_the_batch_axis_of_one_row_goes(model: HookedMoE, tokens: Tensor) -> None:
    _, whole = model.run_with_cache(tokens[:1])
    _, flat = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert whole.has_batch_dim
    assert not flat.has_batch_dim
    for name, x in flat.items():
        assert torch.equal(x, whole[name][0] if axes_of(name)[0] == "batch" else whole[name]), name
    assert whole.remove_batch_dim() is whole
    assert whole.remove_batch_dim()["hook_embed"].dim() == 2  # a second time changes nothing
    with pytest.raises(ValueError, match=r"removed from one row only; hook_embed has 2"):
        model.run_with_cache(tokens, remove_batch_dim=True)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_that_backward_hooks_see(frozen: bool, model: HookedMoE, tokens: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    floats = [name for name in model.hook_dict if not name.endswith("indices")]
    flowing = [name for name in floats if not name.endswith("selection_bias")]  # it only chooses: its gradient is zero
    hooks = [(flowing.__contains__, lambda gradient, hook: seen.__setitem__(hook.name, gradient.clone()))]
    model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks).backward()
    model.zero_grad()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(not frozen)
        loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    assert torch.equal(loss, model(tokens, return_type="loss"))
    assert {f"{name}_grad" for name in seen} <= set(cache)
    for name in floats:
        torch.testing.assert_close(cache[f"{name}_grad"], seen.get(name, torch.zeros_like(cache[name])), atol=1e-7, rtol=1e-5)
    assert "blocks.2.mlp.hook_expert_indices_grad" not in cache
    assert cache["resid_post_grad", 1] is cache["blocks.1.hook_resid_post_grad"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(x.requires_grad for x in cache.values())


def test_one_tensor_in_two_places_has_a_gradient_in_each(model: HookedMoE, tokens: Tensor) -> None:
    shared = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    names = ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    with model.hooks(fwd_hooks=[(name, lambda x, hook: shared) for name in names]):
        loss, cache = model.run_with_cache(tokens, names_filter=names, return_type="loss", incl_bwd=True)
        (both,) = torch.autograd.grad(model(tokens, return_type="loss"), shared)
    first, second = (cache[f"{name}_grad"] for name in names)
    assert first.abs().max() == 0  # the second place hides it
    torch.testing.assert_close(first + second, both)
    assert torch.equal(loss, model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(names[1], lambda x, hook: shared)]))


def test_gradients_are_of_the_chosen_positions(model: HookedMoE, tokens: Tensor) -> None:
    chosen = {"names_filter": ["resid_mid", "pattern"], "return_type": "loss", "incl_bwd": True}
    _, whole = model.run_with_cache(tokens[:1], **chosen)
    _, part = model.run_with_cache(tokens[:1], **chosen, pos_slice=(2, 4), remove_batch_dim=True)
    assert len(part) == 2 * 2 * 3
    for name, x in part.items():
        assert torch.equal(x, whole[name][0, :, 2:4] if "pattern" in name else whole[name][0, 2:4])
    assert whole["resid_mid_grad", 1].abs().max() > 1e-4


@pytest.mark.usefixtures("unchecked")
def test_gradients_need_one_number(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be one number, as with return_type='loss'.*not a tensor \[2, 11, 61\]"):
        model.run_with_cache(tokens, incl_bwd=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"not a tensor \[\] that does not require a gradient"):
        model.run_with_cache(tokens, return_type="loss", incl_bwd=True)


@pytest.mark.parametrize("names", [[], ["expert_indices"]])
def test_gradients_of_nothing_are_none(names: list[str], model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, names_filter=names, return_type="loss", incl_bwd=True)
    assert not [name for name in cache if name.endswith("_grad")]
