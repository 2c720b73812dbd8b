"""The curvature of the loss at the final residual stream: by its definition, in the last layer, and for changes of any size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects, first_order_effects, loss_head
from hooked_moe.counterfactuals.loss_head import LossHead
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks

POSITIONS = 9


def some_tokens() -> Tensor:
    return torch.randint(0, 61, (2, POSITIONS), generator=torch.Generator().manual_seed(3))


def loss_by_definition(model: HookedMoE, clean: Tensor, changed: Tensor, target: int, likely: int) -> float:
    """The change of the loss between two final streams, token by token: `likely` tokens each, the others as one mean token."""
    with torch.no_grad(), without_type_checks():
        p = model.logits(clean[None, None])[0, 0].softmax(-1)
        moved = (model.ln_final(changed) - model.ln_final(clean)) @ model.unembed.W_U.T
    first = sorted(range(len(p)), key=lambda token: -float(p[token]))[:likely]
    others = [token for token in range(len(p)) if token not in first]
    total = sum(float(p[token]) * math.exp(float(moved[token])) for token in first)
    if others:
        mass = sum(float(p[token]) for token in others)
        mean = sum(float(p[token]) * float(moved[token]) for token in others) / mass
        total += mass * math.exp(mean)
    return math.log(total) - float(moved[target])


@pytest.mark.parametrize("likely", [1, 7, 64])
@EVERY_ARCHITECTURE
def test_the_curved_estimate_is_its_formula(architecture: str, likely: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "LIKELY_TOKENS", likely)
    model, tokens = random_model(architecture, dtype=torch.float64), some_tokens()
    found = first_order_effects(model, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    final = cache["resid_post", model.cfg.n_layers - 1]
    for index, layer in enumerate(found.layers):
        for batch, pos in ((0, 0), (1, POSITIONS - 2)):
            x, target = final[batch, pos].clone().requires_grad_(), int(tokens[batch, pos + 1])
            loss = torch.nn.functional.cross_entropy(model.logits(x[None, None])[0], tokens[batch, pos + 1 : pos + 2])
            (gradient,) = torch.autograd.grad(loss, x)
            weights, outputs = (cache[name, layer][batch, pos] for name in ("expert_weights", "expert_out"))
            for slot, change in enumerate(-weights[:, None] * outputs):
                beyond = loss_by_definition(model, x.detach(), x.detach() + change, target, likely) - float(gradient @ change)
                expected = float(found.first_order[index, batch, pos, slot]) + beyond
                assert float(found.first_order_curved[index, batch, pos, slot]) == pytest.approx(expected, rel=1e-9, abs=1e-11)


@EVERY_ARCHITECTURE
def test_in_the_last_layer_it_is_the_effect_but_for_the_tokens_that_are_followed_together(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = random_model(architecture), some_tokens()
    last = model.cfg.moe_layers[-1:]
    exact = expert_effects(model, tokens, last).delta_loss[:, :, :-1]
    errors = []
    for likely in (24, 61):
        monkeypatch.setattr(loss_head, "LIKELY_TOKENS", likely)
        found = first_order_effects(model, tokens, last)
        errors.append(float((found.first_order_curved[:, :, :-1] - exact).abs().max()))
    straight = float((found.first_order[:, :, :-1] - exact).abs().max())
    assert errors[1] < 2e-6, "all 61 tokens of the vocabulary, one by one"
    assert errors[1] < errors[0] < straight


def test_of_small_changes_it_is_the_gradient_and_its_curvature_is_quadratic() -> None:
    model, tokens = random_model("olmoe", dtype=torch.float64), some_tokens()
    resid = torch.randn(2, POSITIONS, model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.cat((tokens[:, 1:], tokens.new_full((2, 1), -1)), dim=1)
    head = LossHead.of(model, resid, targets)
    steps = torch.randn(2, POSITIONS, 3, model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    large, small = (head.beyond_gradient(steps * scale)[:, :-1] for scale in (1e-3, 1e-4))
    torch.testing.assert_close(large / small, torch.full_like(large, 100.0), rtol=0.05, atol=0)
    assert (head.beyond_gradient(steps)[:, -1] == 0).all(), "where there is no next token"
    assert (head.gradient[:, -1] == 0).all()


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model("deepseek"), some_tokens()
    whole = first_order_effects(model, tokens)
    monkeypatch.setattr(loss_head, "LOSSES_PER_CHUNK", 3)
    monkeypatch.setattr(loss_head, "chunk_bytes", lambda device: 1)
    parts = first_order_effects(model, tokens)
    torch.testing.assert_close(parts.first_order_curved, whole.first_order_curved, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_it_is_closer_to_the_effects_of_a_trained_model_than_the_gradient_alone() -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    tokens = model.to_tokens("It was the best of times, it was the worst of times, it was the age of wisdom, it was the age")
    exact = expert_effects(model, tokens).delta_loss[:, :, :-1].flatten()
    found = first_order_effects(model, tokens)
    straight, curved = (
        float(torch.corrcoef(torch.stack((exact, getattr(found, name)[:, :, :-1].flatten())))[0, 1])
        for name in ("first_order", "first_order_curved")
    )
    assert curved > straight + 0.05
