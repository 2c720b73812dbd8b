"""What counterfactuals return: tables in long form, files that give them again, and a heat map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import (
    KL,
    ExpertEffects,
    FirstOrderEffects,
    LossAfter,
    VariantEffects,
    expert_effects,
    first_order_effects,
    progressive_effects,
    token_effects,
)
from hooked_moe.tables import GridResult
from tests.conftest import EVERY_ARCHITECTURE

Ask = Callable[[HookedMoE, Tensor, Tensor], GridResult]
QUESTIONS: dict[str, Ask] = {
    "experts": lambda model, tokens, mask: expert_effects(model, tokens, attention_mask=mask, readouts=[LossAfter(2), KL()]),
    "progressive": lambda model, tokens, mask: progressive_effects(model, tokens, attention_mask=mask),
    "variants": lambda model, tokens, mask: token_effects(
        model,
        tokens,
        lambda clean, queries: clean.resid_mid[None].repeat(2, 1, 1, 1),
        2,
        attention_mask=mask,
        readouts=[LossAfter(1)],
    ),
    "first order": lambda model, tokens, mask: first_order_effects(model, tokens, attention_mask=mask),
}


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return mask


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_file_gives_effects_again_to_the_bit(
    model: HookedMoE, tokens: Tensor, mask: Tensor, question: str, tmp_path: Path
) -> None:
    effects = QUESTIONS[question](model, tokens, mask)
    effects.save(tmp_path / "effects.parquet")
    again = type(effects).load(tmp_path / "effects.parquet")
    assert again.attributes() == effects.attributes()
    assert [*again.columns()] == [*effects.columns()]
    for name in effects.columns():
        one, other = effects.array(name), again.array(name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert isinstance(again, ExpertEffects | VariantEffects | FirstOrderEffects)
    assert again.layers == effects.layers
    assert len(repr(effects)) < 200


def test_rows_are_the_tensors_values(model: HookedMoE, tokens: Tensor, mask: Tensor) -> None:
    effects = expert_effects(model, tokens, layers=[0, 2], attention_mask=mask, readouts=[LossAfter(2)])
    rows = effects.table().to_pylist()
    slots = model.cfg.experts_per_token
    assert len(rows) == 2 * int(mask.sum()) * slots, "padding has no rows"
    for row in rows[::7]:
        place = (effects.layers.index(row["layer"]), row["batch"], row["pos"], row["slot"])
        for name in ("delta_loss", "kl", "gap_norm", "routing_weight"):
            np.testing.assert_equal(row[name], float(getattr(effects, name)[place]))
        assert row["expert_index"] == int(effects.expert_index[place])
        np.testing.assert_equal(row["baseline_loss"], float(effects.baseline_loss[place[1:3]]))
        np.testing.assert_equal(row["readouts/loss_after"], effects.readouts["loss_after"][place].tolist())


def test_variants_have_their_number_in_the_rows(model: HookedMoE, tokens: Tensor, mask: Tensor) -> None:
    effects = QUESTIONS["variants"](model, tokens, mask)
    assert isinstance(effects, VariantEffects)
    for row in effects.table().to_pylist()[::11]:
        place = (effects.layers.index(row["layer"]), row["variant"], row["batch"], row["pos"])
        np.testing.assert_equal(row["delta_loss"], float(effects.delta_loss[place]))


def test_the_picture_is_of_layers_and_experts(model: HookedMoE, tokens: Tensor) -> None:
    effects = expert_effects(model, tokens)
    drawn = effects.plot().axes[0].images[0].get_array().filled(np.nan)
    assert drawn.shape == (3, model.cfg.num_experts)
    for layer in range(3):
        for expert in range(model.cfg.num_experts):
            values = effects.delta_loss[layer][effects.expert_index[layer] == expert]
            expected = values[values.isfinite()].double().mean()
            np.testing.assert_allclose(drawn[layer, expert], float(expected), rtol=1e-5)
    by_position = effects.plot("kl", "pos").axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(by_position[1, 4], float(effects.kl[1, :, 4].double().mean()), rtol=1e-5)
