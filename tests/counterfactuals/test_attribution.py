"""First-order effects against finite differences of masked forwards, and against a gradient taken position by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.components.attention import Attention, QueriesKeysValues
from hooked_moe.components.block import Block
from hooked_moe.components.rotary import Rotation, rotation
from hooked_moe.counterfactuals import expert_effects, loss_head
from hooked_moe.counterfactuals import first_order as attribution
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.first_order import first_order_effects
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.counterfactuals.test_counterfactuals import PADDING, architectures

POSITIONS = 11


def some_tokens() -> Tensor:
    return torch.randint(0, 61, (2, POSITIONS), generator=torch.Generator().manual_seed(1))


def slope(model: HookedMoE, tokens: Tensor, mask: Tensor | None, layer: int, batch: int, pos: int, expert: int) -> float:
    """-dloss/ds of the expert's contribution times s at one token, at s = 1: a central difference in float64."""
    step, losses = 1e-5, []
    for scale in (1 - step, 1 + step):
        keep = torch.ones(*tokens.shape, model.cfg.experts_in(layer), dtype=torch.float64)
        keep[batch, pos, expert] = scale
        with torch.no_grad(), without_type_checks():
            options: dict[str, Any] = {"attention_mask": mask, "expert_mask": ExpertMask({layer: keep})}
            losses.append(float(model(tokens, "loss", loss_per_token=True, **options)[batch, pos]))
    return (losses[0] - losses[1]) / (2 * step)


def assert_slopes(model: HookedMoE, tokens: Tensor, mask: Tensor | None, places: list[tuple[int, int]]) -> None:
    found = first_order_effects(model, tokens, attention_mask=mask)
    assert found.layers == model.cfg.moe_layers
    for index, layer in enumerate(found.layers):
        for batch, pos in places:
            for slot, expert in enumerate(found.expert_index[index, batch, pos].tolist()):
                expected = slope(model, tokens, mask, layer, batch, pos, expert)
                assert float(found.first_order[index, batch, pos, slot]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@EVERY_ARCHITECTURE
def test_they_are_slopes_of_the_loss_as_one_expert_fades_at_one_token(architecture: str, padding: str) -> None:
    model = random_model(architecture, dtype=torch.float64)
    places = {"none": [(0, 0), (0, 6), (1, 9)], "left": [(0, 3), (1, 9)], "holes": [(0, 0), (0, 6), (1, 6)]}[padding]
    assert_slopes(model, some_tokens(), PADDING[padding], places)


@given(architecture=architectures(), length=st.integers(2, 7), data=st.data())
@settings(max_examples=12, deadline=None)
def test_they_are_slopes_in_any_architecture(architecture: dict[str, Any], length: int, data: st.DataObject) -> None:
    model = random_model(**architecture, dtype=torch.float64)
    tokens = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))
    assert_slopes(model, tokens, None, [(1, data.draw(st.integers(0, length - 2)))])


def attention_by_definition(attn: Attention, own: QueriesKeysValues, clean: QueriesKeysValues, pos: int) -> Tensor:
    """Of the token at `pos`: over the clean run's keys and values before it, which are constants, and its own."""
    first = max(0, pos + 1 - (attn.window or pos + 1))
    k = torch.cat((clean.k[:, first:pos].detach(), own.k), dim=1)
    v = torch.cat((clean.v[:, first:pos].detach(), own.v), dim=1)
    group = own.q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhe,bkhe->bhqk", own.q, k) * attn.cfg.attention_scale
    if attn.sink is not None:
        scores = torch.cat((scores, attn.sink[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    pattern = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhe->bqhe", pattern, v)


def gradient_by_definition(model: HookedMoE, tokens: Tensor, layer: int, pos: int) -> Tensor:
    """d(loss at pos)/d(routed output of a layer there), [batch, d_model]: the token alone through the layers above."""
    clean: dict[int, QueriesKeysValues] = {}
    whole = rotation(torch.arange(tokens.shape[1])[None], model.cfg)
    resid = model.embed(tokens)
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            clean[number] = block.attn.project(block.ln1(resid), whole)
            resid = block(resid, whole)
            if number == layer:
                leaf = resid[:, pos : pos + 1].clone()
    leaf.requires_grad_()
    here = rotation(torch.tensor([[pos]]), model.cfg)
    alone = leaf
    for number in range(layer + 1, model.cfg.n_layers):
        alone = through(model.blocks[number], alone, here, clean[number], pos)
    loss = F.cross_entropy(model.logits(alone)[:, 0], tokens[:, pos + 1], reduction="sum")
    return torch.autograd.grad(loss, leaf)[0][:, 0]


def through(block: Block, resid: Tensor, here: Rotation, clean: QueriesKeysValues, pos: int) -> Tensor:
    own = block.attn.project(block.ln1(resid), here)
    mid = resid + block.attn.output(attention_by_definition(block.attn, own, clean, pos))
    return mid + block.mlp(block.ln2(mid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_ARCHITECTURE
def test_one_backward_pass_equals_a_gradient_for_each_position(architecture: str, dtype: torch.dtype) -> None:
    model, tokens = random_model(architecture, dtype=dtype), some_tokens()
    found = first_order_effects(model, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for index, layer in enumerate(found.layers):
        contributions = cache["expert_weights", layer].unsqueeze(-1) * cache["expert_out", layer]
        for pos in range(POSITIONS - 1):
            gradient = gradient_by_definition(model, tokens, layer, pos)
            expected = -torch.einsum("bkd,bd->bk", contributions[:, pos], gradient)
            torch.testing.assert_close(found.first_order[index, :, pos], expected, atol=2e-6, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_small_removals_are_as_estimated_and_slots_are_those_of_the_effects(architecture: str) -> None:
    model = random_model(architecture)
    with torch.no_grad():
        for layer in model.cfg.moe_layers:
            for name, parameter in model.blocks[layer].mlp.experts.named_parameters():
                if name.endswith("_out"):
                    parameter.mul_(1e-2)  # what is removed is small, so that the loss is nearly linear in it
    effects, found = expert_effects(model, some_tokens()), first_order_effects(model, some_tokens())
    assert torch.equal(found.expert_index, effects.expert_index)
    exact, estimate = effects.delta_loss[:, :, :-1], found.first_order[:, :, :-1]
    assert exact.abs().max() > 1e-3
    close = torch.isclose(estimate, exact, atol=2e-5, rtol=2e-2)
    assert close.double().mean() > 0.98, "all but where a later router changes its mind: a jump that no slope foresees"


def test_what_has_no_next_token_has_no_estimate(model: HookedMoE) -> None:
    found = first_order_effects(model, some_tokens(), attention_mask=PADDING["both"])
    assert found.first_order[:, 0, 2:7].isfinite().all()
    assert found.first_order[:, 0, [0, 1, 7, 8]].isnan().all()
    assert (found.expert_index[:, 0, [0, 1, 8]] == -1).all()
    assert (found.expert_index[:, 0, 7] >= 0).all(), "but it is routed"


def test_rows_layers_and_losses_at_once_change_nothing_but_rounding(model: HookedMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_order_effects(model, some_tokens())
    last = first_order_effects(model, some_tokens(), [2])
    torch.testing.assert_close(last.first_order, whole.first_order[2:], atol=2e-6, rtol=1e-4, equal_nan=True)
    monkeypatch.setattr(loss_head, "LOSSES_PER_CHUNK", 3)
    demand = demand_of(model.cfg, POSITIONS, chunk_size=POSITIONS)
    block, residuals = attribution.BACKWARD_ACTIVATIONS * demand.row, 5 * POSITIONS * demand.variant_token
    one_row, three_blocks = (demand.fixed + residuals + blocks * block for blocks in (1, 3))
    for budget in (one_row, three_blocks - 1, three_blocks):  # the last keeps the activations of all blocks
        by_row = first_order_effects(model, some_tokens(), memory_budget=budget)
        torch.testing.assert_close(by_row.first_order, whole.first_order, atol=2e-6, rtol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match=r"memory_budget is .* and the gradient of a row of 11 tokens takes"):
        first_order_effects(model, some_tokens(), memory_budget=one_row - 1)


def test_it_runs_under_inference_mode_and_leaves_no_gradients(model: HookedMoE) -> None:
    expected = first_order_effects(model, some_tokens())
    with torch.inference_mode():
        found = first_order_effects(model, some_tokens())
    assert torch.equal(found.first_order.nan_to_num(7.0), expected.first_order.nan_to_num(7.0))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(make_model: Callable[..., HookedMoE], dtype: torch.dtype) -> None:
    wide = first_order_effects(make_model(n_layers=2), some_tokens()).first_order[:, :, :-1]
    half = first_order_effects(make_model(n_layers=2).to(dtype), some_tokens()).first_order[:, :, :-1]
    assert half.dtype == torch.float32
    assert (half - wide).abs().median() < 2e-2
    assert torch.corrcoef(torch.stack([half.flatten(), wide.flatten()]))[0, 1] > 0.9
