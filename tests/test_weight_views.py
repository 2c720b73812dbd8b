"""Weights by TransformerLens's names: the computation written with them is the model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.checks import UnknownNameError
from hooked_moe.weight_views import NAMES
from tests.conftest import EVERY_ARCHITECTURE, activated


@EVERY_ARCHITECTURE
def test_products_with_the_weights_are_the_activations(model: HookedMoE, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(model.W_E[tokens], cache["embed"])
    torch.testing.assert_close(cache["normalized", None, "ln_final"] * model.ln_final.w @ model.W_U + model.b_U, logits)
    for layer, block in enumerate(model.blocks):
        out = torch.einsum("bphv,hvd->bpd", cache["z", layer], model.weight("W_O", layer))
        expected = cache["attn_out", layer] - (0 if block.attn.b_O is None else block.attn.b_O)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        x = cache["normalized", layer, "ln2"] * block.ln2.w
        if model.cfg.experts_in(layer):
            router, experts, indices = block.mlp.router, block.mlp.experts, cache["expert_indices", layer]
            logits = x @ model.weight("W_router", layer) + (0 if router.b_logits is None else router.b_logits)
            torch.testing.assert_close(logits, cache["router_logits", layer], atol=1e-5, rtol=1e-5)
            w_in, w_gate, w_out = (model.weight(name, layer)[indices] for name in ("W_in", "W_gate", "W_out"))
            x, b_gate, b_in, b_out = x[:, :, None, None], 0, 0, 0
            if experts.b_in is not None:
                b_gate, b_in = experts.b_in[indices].split(1, dim=-2)
                b_out = experts.b_out[indices]
            neurons = activated(x @ w_gate + b_gate, x @ w_in + b_in, experts.clamp)
            torch.testing.assert_close((neurons @ w_out)[..., 0, :] + b_out, cache["expert_out", layer], atol=1e-5, rtol=1e-4)
        else:
            w_in, w_gate, w_out = (model.weight(name, layer) for name in ("W_in", "W_gate", "W_out"))
            made = (torch.nn.functional.silu(x @ w_gate) * (x @ w_in)) @ w_out
            torch.testing.assert_close(made, cache["mlp_out", layer], atol=1e-5, rtol=1e-5)


def test_queries_keys_and_values_are_products_with_theirs(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    for layer, block in enumerate(model.blocks):
        x = cache["normalized", layer, "ln1"] * block.ln1.w
        for name in "QKV":
            made = torch.einsum("bpd,hde->bphe", x, getattr(model, f"W_{name}")[layer]) + getattr(block.attn, f"b_{name}")
            torch.testing.assert_close(made, cache[name.lower(), layer], atol=1e-5, rtol=1e-5)


def test_stacks_are_of_all_layers_and_gradients_pass_through_them(model: HookedMoE) -> None:
    shapes = {
        "W_Q": [3, 4, 32, 8],
        "W_K": [3, 2, 32, 8],
        "W_V": [3, 2, 32, 8],
        "W_O": [3, 4, 8, 32],
        "W_in": [3, 6, 32, 12],
        "W_gate": [3, 6, 32, 12],
        "W_out": [3, 6, 12, 32],
        "W_router": [3, 32, 6],
    }
    assert set(shapes) == set(NAMES)
    for name, shape in shapes.items():
        stack = getattr(model, name)
        assert list(stack.shape) == shape
        for layer in range(3):
            assert torch.equal(stack[layer], model.weight(name, layer - 3))
        stack[1].sum().backward()
    assert bool(model.blocks[1].mlp.experts.W_in.grad.eq(1).all())
    assert bool(model.blocks[0].mlp.experts.W_in.grad.eq(0).all())


def test_what_can_be_a_view_is_one(model: HookedMoE) -> None:
    assert model.W_E.data_ptr() == model.embed.W_E.data_ptr()
    assert model.W_U.data_ptr() == model.unembed.W_U.data_ptr()
    for name in NAMES:
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.blocks[1].parameters()}
        assert model.weight(name, 1).untyped_storage().data_ptr() in storages


def test_a_model_is_saved_with_its_parameters_alone(model: HookedMoE) -> None:
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["deepseek"])
def test_weights_that_are_not_there_are_answered(model: HookedMoE) -> None:
    for name, layer, message in (
        ("W_router", 0, r"layer 0 is dense: it has no router; layers \[1, 2\] have"),
        ("W_Q", 1, r"latent attention has no W_Q from the residual stream.*attn.W_DQ and .W_Q"),
        ("W_K", 1, r"latent attention has no W_K .*attn.W_DKV and .W_UKV"),
        ("W_in", 3, r"layer must be a whole number from 0 to 2, not 3"),
        ("W_ins", 1, r"unknown weight 'W_ins'; did you mean 'W_in'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.weight(name, layer)
    with pytest.raises(ValueError, match=r"W_in have different shapes.*\[32, 24\], \[6, 32, 12\].*model.weight\('W_in', layer\)"):
        _ = model.W_in
    with pytest.raises(ValueError, match="layer 0 is dense"):
        _ = model.W_router
    assert issubclass(UnknownNameError, ValueError)


def test_directions_of_tokens_make_their_logits(model: HookedMoE, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    final = cache["normalized", None, "ln_final"] * model.ln_final.w
    for ids in (5, torch.tensor(5), torch.tensor([5]), [5, 7], torch.tensor([[1, 2, 3]])):
        directions = model.tokens_to_residual_directions(ids)
        flat = torch.as_tensor(ids).flatten()
        torch.testing.assert_close(final @ directions.reshape(-1, 32).T, logits[..., flat], atol=1e-5, rtol=1e-5)
    assert model.tokens_to_residual_directions(5).shape == (32,)
    assert model.tokens_to_residual_directions(torch.tensor([[1, 2, 3]])).shape == (1, 3, 32)
    for wrong in (61, -1, torch.tensor([0.5]), []):
        with pytest.raises(ValueError, match=r"tokens must be ids from 0 to 60, or texts of one token"):
            model.tokens_to_residual_directions(wrong)


def test_biases_add_up(model: HookedMoE, make_model: Callable[..., HookedMoE]) -> None:
    biases = torch.stack([block.attn.b_O for block in model.blocks])
    torch.testing.assert_close(model.accumulated_bias(2), biases[:2].sum(0))
    torch.testing.assert_close(model.accumulated_bias(2, mlp_input=True), biases.sum(0))
    assert not make_model("deepseek").accumulated_bias(3).any()
