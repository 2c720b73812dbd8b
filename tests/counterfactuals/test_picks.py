"""Picked removals against the dense table: the same numbers, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hooked_moe.counterfactuals.engine.fan_out as engine
from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import KL, Mean, expert_effects, expert_means
from hooked_moe.counterfactuals.engine import pick_losses
from hooked_moe.counterfactuals.engine.lanes import Lanes
from hooked_moe.counterfactuals.engine.losses import prediction_change
from hooked_moe.counterfactuals.results import PER_SLOT, ExpertEffects
from hooked_moe.kernels.cpu import prefix_attention as on_cpu
from tests.conftest import EVERY_ARCHITECTURE, random_model

NATS = 1e-5
PADDING = {
    "none": None,
    "left": torch.tensor([[0] * 3 + [1] * 8, [1] * 11]),
    "holes": torch.tensor([[1] * 4 + [0] + [1] * 6, [0] + [1] * 2 + [0] * 2 + [1] * 6]),
}


def random_tokens(batch: int, pos: int) -> Tensor:
    return torch.randint(0, 61, (batch, pos), generator=torch.Generator().manual_seed(1))


def some_picks(dense: ExpertEffects, share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(dense.delta_loss.shape, generator=generator) < share


def assert_picked(picked: ExpertEffects, dense: ExpertEffects, picks: Tensor) -> None:
    """Picks are what the dense table says, all else is nan, and the clean run is observed everywhere."""
    for name in ("delta_loss", "kl"):
        found, expected = getattr(picked, name), getattr(dense, name)
        assert found.shape == expected.shape
        assert bool((found.isfinite() == (picks & expected.isfinite())).all())
        measured = found.isfinite()
        torch.testing.assert_close(found[measured], expected[measured], atol=NATS, rtol=0)
    for name in (*PER_SLOT, "router_probability", "baseline_loss"):
        if name not in ("delta_loss", "kl"):
            torch.testing.assert_close(getattr(picked, name), getattr(dense, name), atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@EVERY_ARCHITECTURE
def test_picks_are_the_same_numbers_as_in_the_dense_table(removal: Any, padding: str, model: HookedMoE) -> None:
    tokens, mask = random_tokens(batch=2, pos=11), PADDING[padding]
    dense = expert_effects(model, tokens, removal=removal, attention_mask=mask)
    picks = some_picks(dense, 0.2)
    assert_picked(expert_effects(model, tokens, removal=removal, attention_mask=mask, picks=picks), dense, picks)


@pytest.mark.parametrize(
    "options",
    [
        {"windowed_layers": (0, 2), "sliding_window": 3, "n_layers": 3},
        {"dense_layers": (0,), "d_mlp": 7, "d_shared": 5, "n_layers": 3},
        {"n_key_value_heads": 1, "n_layers": 4},
    ],
    ids=["sliding window", "dense first layer, shared experts", "one key/value head"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "spelled out"])
def test_odd_models(options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(on_cpu, "_FUSED_DTYPES", ())
    model, tokens = random_model("olmoe", **options), random_tokens(batch=2, pos=11)
    dense = expert_effects(model, tokens)
    picks = some_picks(dense, 0.3)
    assert_picked(expert_effects(model, tokens, picks=picks), dense, picks)


@EVERY_ARCHITECTURE
def test_means_may_take_the_place_of_picked_experts(model: HookedMoE) -> None:
    tokens = random_tokens(batch=2, pos=11)
    removal = Mean(expert_means(model, [tokens]))
    dense = expert_effects(model, tokens, removal=removal)
    picks = some_picks(dense, 0.2)
    assert_picked(expert_effects(model, tokens, removal=removal, picks=picks), dense, picks)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_can_be_picked(share: float, model: HookedMoE) -> None:
    tokens = random_tokens(batch=2, pos=11)
    dense = expert_effects(model, tokens)
    picks = some_picks(dense, share)
    assert_picked(expert_effects(model, tokens, picks=picks), dense, picks)


def test_picks_of_few_layers_and_of_one_row_only(model: HookedMoE) -> None:
    tokens, layers = random_tokens(batch=3, pos=11), model.cfg.moe_layers[-1:]
    dense = expert_effects(model, tokens, layers)
    picks = some_picks(dense, 0.5)
    picks[:, [0, 2]] = False
    assert_picked(expert_effects(model, tokens, layers, picks=picks), dense, picks)


def test_parts_that_fit_into_memory_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, model: HookedMoE) -> None:
    tokens = random_tokens(batch=3, pos=11)
    dense = expert_effects(model, tokens)
    picks = some_picks(dense, 0.6)
    monkeypatch.setattr(engine, "chunk_size_on", lambda device: 7)
    for room in ((1, 1000), (2, 1000), (1, 5)):
        monkeypatch.setattr("hooked_moe.counterfactuals.engine.requests.Request.room_for_picks", lambda self, picks, r=room: r)
        assert_picked(expert_effects(model, tokens, picks=picks), dense, picks)


def test_a_budget_is_kept_or_refused(model: HookedMoE) -> None:
    tokens = random_tokens(batch=2, pos=11)
    dense = expert_effects(model, tokens)
    picks = some_picks(dense, 0.5)
    assert_picked(expert_effects(model, tokens, picks=picks, memory_budget="100MB"), dense, picks)
    with pytest.raises(ValueError, match="memory_budget is 1,000 bytes"):
        expert_effects(model, tokens, picks=picks, memory_budget=1000)


def test_what_goes_through_a_block_is_in_proportion_to_the_picks(monkeypatch: pytest.MonkeyPatch, model: HookedMoE) -> None:
    tokens = random_tokens(batch=1, pos=11)
    picks = torch.zeros(expert_effects(model, tokens).delta_loss.shape, dtype=torch.bool)
    picks[0, 0, 4, 1] = picks[0, 0, 4, 0] = picks[-1, 0, 6, 0] = True
    advanced = []
    original = engine.advance

    def counted(variants: Tensor, *rest: Any) -> None:
        advanced.append(variants.shape[:3].numel())
        original(variants, *rest)

    monkeypatch.setattr(engine, "advance", counted)
    expert_effects(model, tokens, picks=picks)
    assert sum(advanced) == 2 * (model.cfg.moe_layers[-1] - model.cfg.moe_layers[0])


@pytest.mark.parametrize("together", [1, 3, 1024])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 64])
def test_picks_at_one_token_share_its_clean_prediction(
    tokens_at_once: int, together: int, monkeypatch: pytest.MonkeyPatch, model: HookedMoE
) -> None:
    """However the picks are cut, every one has its place, and no token is predicted twice from the clean run."""
    generator = torch.Generator().manual_seed(2)
    clean, targets = torch.randn(2, 7, model.cfg.d_model, generator=generator), torch.randint(0, 61, (2, 7), generator=generator)
    targets[0, 6] = targets[1, 2] = -1
    positions = torch.tensor([[0, 4, 4, 6, 4, 2, 0, 4, 4], [5, 5, 2, 0, 1, 2, 5, 3, 3]])
    at_picks = clean[torch.arange(2)[:, None], positions]
    changed = at_picks + torch.randn(at_picks.shape, generator=generator)
    predicted = []

    class Counted(pick_losses.CleanPrediction):
        def __init__(self, model: Any, resid: Tensor, *rest: Any) -> None:
            predicted.extend(resid.tolist())
            super().__init__(model, resid, *rest)

    monkeypatch.setattr(pick_losses, "CleanPrediction", Counted)
    monkeypatch.setattr(pick_losses, "rows_per_chunk", lambda weight, dtype: tokens_at_once)
    monkeypatch.setattr(pick_losses, "rows_together", lambda device: together)
    own = targets.gather(1, positions)
    found = pick_losses.prediction_change_of_picks(model, changed, clean, positions, own)
    expected = prediction_change(model, changed[None], at_picks, own)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=NATS, rtol=0, equal_nan=True)
    at_all = clean[torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 2, 4, 0, 1, 3, 5])].tolist()
    assert sorted(predicted) == sorted(at_all)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"picks": torch.ones(1, 2, 3, dtype=torch.bool)}, r"bool mask \[layer, batch, pos, slot\] = "),
        ({"picks": torch.ones(1, 1, 11, 2)}, "not torch.float32"),
        ({"picks": [(0, 0, 0, 0)]}, "not list"),
        ({"scope": "sequence"}, "leave out scope"),
        ({"positions": [1]}, "leave out scope"),
        ({"readouts": [KL()]}, "leave out scope"),
    ],
)
def test_bad_picks_are_refused(arguments: dict[str, Any], message: str, model: HookedMoE) -> None:
    tokens = random_tokens(batch=1, pos=11)
    picks = torch.ones(len(model.cfg.moe_layers), 1, 11, model.cfg.experts_per_token, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        expert_effects(model, tokens, **{"picks": picks, **arguments})


def test_a_lookup_of_what_was_not_picked_is_refused(model: HookedMoE) -> None:
    tokens = random_tokens(batch=1, pos=11)
    dense = expert_effects(model, tokens)
    picks = torch.zeros(dense.delta_loss.shape, dtype=torch.bool)
    picks[0, 0, 4, 0] = True
    picked = expert_effects(model, tokens, picks=picks)
    layer = picked.layers[0]
    first, second = picked.expert_index[0, 0, 4, :2].tolist()
    assert abs(picked.at(layer, 0, 4, first)["delta_loss"] - dense.at(layer, 0, 4, first)["delta_loss"]) < NATS
    with pytest.raises(ValueError, match=f"expert {second} was not removed"):
        picked.at(layer, 0, 4, second)


def test_lanes_of_variants_and_of_tokens() -> None:
    variants = torch.arange(24.0).view(4, 1, 6, 1)
    by_variant, by_token = Lanes.of_variants([1, 3], 2), Lanes({1: 4, 3: 2}, 2)
    assert by_variant.entered(variants, 1).shape[0] == 0
    assert by_variant.entering(variants, 3).flatten().tolist() == variants[2:].flatten().tolist()
    assert by_token.entered(variants[:1], 2).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert by_token.entering(variants[:1], 3).flatten().tolist() == [4.0, 5.0]


@pytest.mark.parametrize("budget", [None, "68MB"], ids=["in memory", "in a file"])
def test_picks_of_a_streamed_model_wait_between_its_layers(budget: str | None, tmp_path: Path) -> None:
    whole, tokens = random_model("olmoe"), random_tokens(batch=2, pos=11)
    whole.save_pretrained(tmp_path)
    streamed = HookedMoE.from_pretrained(tmp_path, stream=True)
    dense = expert_effects(whole, tokens)
    picks = some_picks(dense, 0.3)
    assert_picked(expert_effects(streamed, tokens, picks=picks, memory_budget=budget), dense, picks)
