"""Experts kept in a narrower dtype than that of products: the products of the rounded weights in float32, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.cli import options
from hooked_moe.counterfactuals import expert_effects, first_order_effects
from hooked_moe.measurement.verification import verify
from tests.conftest import EVERY_ARCHITECTURE, random_model


def rounded(model: HookedMoE) -> tuple[HookedMoE, HookedMoE]:
    """The model with experts that bfloat16 holds exactly: in float32, and stored in bfloat16."""
    with torch.no_grad():
        for layer in model.cfg.moe_layers:
            for parameter in model.blocks[layer].mlp.experts.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
    stored = HookedMoE(model.cfg.replace(store=torch.bfloat16))
    stored.load_state_dict(model.state_dict())
    return model.requires_grad_(False), stored.requires_grad_(False)


def assert_same(found: Any, expected: Any, *names: str) -> None:
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-6, rtol=1e-5, equal_nan=True)


@EVERY_ARCHITECTURE
def test_effects_are_those_of_products_in_float32(architecture: str, tokens: Tensor) -> None:
    wide, stored = rounded(random_model(architecture))
    experts = stored.blocks[stored.cfg.moe_layers[0]].mlp.experts
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.bfloat16}
    assert {p.dtype for name, p in stored.named_parameters() if ".experts." not in name} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(stored(tokens), wide(tokens), atol=2e-6, rtol=1e-5)
        _, cache = stored.run_with_cache(tokens)
        _, expected = wide.run_with_cache(tokens)
        for name in expected:
            torch.testing.assert_close(cache[name], expected[name], atol=2e-6, rtol=1e-5)
    assert_same(expert_effects(stored, tokens), expert_effects(wide, tokens), "delta_loss", "kl", "gap_norm")
    estimates = first_order_effects(stored, tokens), first_order_effects(wide, tokens)
    assert_same(*estimates, "first_order", "first_order_curved")


def test_a_shipped_model_that_is_rounded_is_off_by_less_than_the_stated_error() -> None:
    wide, stored = HookedMoE.from_pretrained("tiny-olmoe"), HookedMoE.from_pretrained("tiny-olmoe", store="bfloat16")
    tokens = wide.to_tokens("The sea was calm that night, and nobody spoke of the ship.")
    off = (expert_effects(stored, tokens).delta_loss - expert_effects(wide, tokens).delta_loss)[:, :, :-1].abs()
    assert 0 < off.median() < 1e-4
    assert all(check.passed for check in verify(stored, tokens)), "as exact as in float32, of the weights as they are stored"


def test_streamed_blocks_are_stored_as_narrow(tokens: Tensor, tmp_path: Path) -> None:
    model, stored = rounded(random_model(architecture="deepseek", model_type="deepseek_v2", n_layers=4, d_shared=24))
    model.save_pretrained(tmp_path)
    streamed = HookedMoE.from_pretrained(tmp_path, store="bfloat16", stream=True)
    assert {p.dtype for p in streamed.blocks[1].mlp.experts.parameters()} == {torch.bfloat16}
    assert torch.equal(
        expert_effects(streamed, tokens).delta_loss.nan_to_num(7.0), expert_effects(stored, tokens).delta_loss.nan_to_num(7.0)
    )


def test_it_goes_with_other_dtypes_of_the_model_and_is_said(tmp_path: Path) -> None:
    random_model(architecture="olmoe", model_type="olmoe").save_pretrained(tmp_path)
    stored = HookedMoE.from_pretrained(tmp_path, store="bfloat16")
    assert "float32, experts stored in bfloat16, on cpu" in repr(stored)
    assert stored.cfg.store == torch.bfloat16
    half = HookedMoE.from_pretrained(tmp_path, store="bfloat16").to(torch.bfloat16)
    assert half.cfg.store is None
    assert half.cfg.dtype == torch.bfloat16
    assert HookedMoE.from_pretrained(tmp_path, store="float32").cfg.store is None
    with pytest.raises(ValueError, match=r"store \(torch.float32\) must be narrower than dtype \(torch.bfloat16\)"):
        HookedMoE.from_pretrained(tmp_path, dtype="bfloat16", store="float32")
    stored.requires_grad_(True)
    with pytest.raises(ValueError, match="take no gradient: load the model without store= to train it"):
        stored(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("units", "name", "said"), [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False)]
)
def test_products_in_bfloat16_without_units_for_them_are_noted(
    units: bool, name: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "has_units_for", lambda name: units)
    assert options.dtype_named(name, torch.device("cpu")) == getattr(torch, name)
    assert ("--store bfloat16 in place of --dtype bfloat16" in capsys.readouterr().out) == said


def test_a_model_that_is_stored_narrow_is_saved_as_it_computes(tokens: Tensor, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "wide")
    stored = HookedMoE.from_pretrained(tmp_path / "wide", store="bfloat16")
    stored.save_pretrained(tmp_path / "narrow")
    again = HookedMoE.from_pretrained(tmp_path / "narrow")
    assert (again.cfg.dtype, again.cfg.store) == (torch.float32, None)
    torch.testing.assert_close(again(tokens), stored(tokens), atol=1e-5, rtol=1e-5)
