"""The checks before a measurement: each passes on a sound model, and each fails on the fault that it is there to find."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooked_moe.components.losses
from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.components.moe import combine_onto
from hooked_moe.counterfactuals import LossAfter, Zero, expert_removal, removals
from hooked_moe.counterfactuals.engine import fan_out, losses
from hooked_moe.counterfactuals.engine.steps import Steps, pausable, run_to_end
from hooked_moe.expert_mask import LayerMask
from hooked_moe.kernels import target_loss
from hooked_moe.kernels.target_loss import LossAndLogSum
from hooked_moe.loading.fingerprint import config_values, versions, weights_sha256
from hooked_moe.measurement import full_forwards, verification
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.verification import Check, verify
from tests.conftest import EVERY_ARCHITECTURE

CHECKS = ["loss", "no stale state", "losses differ", "inactive expert", "effects are exact"]
BOTH_SCOPES = [*CHECKS, "effects are exact, sequence-wide"]
FROM_POSITION = "effects are exact, from the position on"
Patch = pytest.MonkeyPatch
UNCHECKED = pytest.mark.usefixtures("unchecked")  # sound models make the same calls, with their types checked


@pytest.fixture
def sequence() -> Tensor:
    return torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(2))


def failed(checks: list[Check]) -> list[str]:
    assert [check.name for check in checks] in (CHECKS, BOTH_SCOPES, [*CHECKS[:-1], FROM_POSITION])
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts_per_token": 1},
        {"num_experts": 3, "experts_per_token": 3},
        {"num_experts": 1, "experts_per_token": 1},
        {"n_layers": 1},
        {"norm_topk_prob": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.float64},
        {"architecture": "deepseek", "dense_layers": (0, 1)},
        {"architecture": "deepseek", "d_value": 20},
        {"architecture": "deepseek", "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_sound_model_passes(make_model: Callable[..., HookedMoE], changes: dict[str, Any], sequence: Tensor) -> None:
    checks = verify(make_model(**changes), sequence)
    assert failed(checks) == []
    assert all(math.isfinite(check.value) and check.detail for check in checks)


@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@EVERY_ARCHITECTURE
def test_a_sound_model_passes_with_every_removal_in_both_scopes(model: HookedMoE, removal: Any, sequence: Tensor) -> None:
    checks = verify(model, sequence, removal, ("position", "sequence"))
    assert failed(checks) == []
    assert [check.name for check in checks] == BOTH_SCOPES


@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@EVERY_ARCHITECTURE
def test_a_sound_model_passes_from_the_position_on(model: HookedMoE, removal: Any, sequence: Tensor) -> None:
    checks = verify(model, sequence, removal, ("from_position",))
    assert failed(checks) == []
    assert checks[-1].name == FROM_POSITION


def test_the_same_sequence_gives_the_same_checks(model: HookedMoE, sequence: Tensor) -> None:
    assert verify(model, sequence) == verify(model, sequence)


@pytest.mark.parametrize("shape", [(1, 7), (2, 20)])
def test_one_sequence_of_eight_tokens_or_more_is_needed(model: HookedMoE, shape: tuple[int, int], unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"one sequence \[1, pos\] of 8 tokens or more"):
        verify(model, torch.zeros(shape, dtype=torch.long))


# --- faults, and the check that finds each -------------------------------------------------------------------------------


@UNCHECKED
def test_a_loss_that_is_no_cross_entropy_fails_the_first_check_alone(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    in_engine, in_forward = target_loss.cross_entropy, hooked_moe.components.losses.next_token_loss

    def in_bits(*inputs: Any, **options: Any) -> LossAndLogSum:
        loss, log_sum = in_engine(*inputs, **options)
        return LossAndLogSum(loss / math.log(2), log_sum)

    changed_to = losses.CleanPrediction.changed_to

    def changed_in_bits(clean: losses.CleanPrediction, resid: Tensor) -> tuple[Tensor, Tensor]:
        loss, kl = changed_to(clean, resid)
        return clean.loss + (loss - clean.loss) / math.log(2), kl

    for module in (target_loss, losses):
        monkeypatch.setattr(module, "cross_entropy", in_bits)
    monkeypatch.setattr(losses.CleanPrediction, "changed_to", changed_in_bits)
    monkeypatch.setattr(hooked_moe.components.losses, "next_token_loss", lambda *inputs: in_forward(*inputs) / math.log(2))
    assert failed(verify(model, sequence)) == ["loss"]


@UNCHECKED
def test_losses_of_the_token_before_fail_the_first_check(model: HookedMoE, sequence: Tensor, monkeypatch: Patch) -> None:
    original = losses.loss_at
    with monkeypatch.context() as patch:
        patch.setattr(fan_out, "loss_at", lambda model, resid, targets: original(model, resid, targets.roll(1, -1)))
        assert "loss" in failed(verify(model, sequence))
    loss = hooked_moe.components.losses.next_token_loss
    monkeypatch.setattr(hooked_moe.components.losses, "next_token_loss", lambda logits, *rest: loss(logits.roll(1, 1), *rest))
    assert "loss" in failed(verify(model, sequence))


@UNCHECKED
def test_a_mask_that_leaves_something_behind_fails_the_second_check_alone(
    make_model: Callable[..., HookedMoE], sequence: Tensor, monkeypatch: Patch
) -> None:
    model = make_model()
    original, calls = ExpertMask.for_layer, []

    def stale(self: ExpertMask, *inputs: Any) -> LayerMask | None:
        if not calls:
            model.ln_final.w.mul_(1.01)
        calls.append(inputs)
        return original(self, *inputs)

    monkeypatch.setattr(ExpertMask, "for_layer", stale)
    assert failed(verify(model, sequence)) == ["no stale state"]


@UNCHECKED
def test_a_mask_that_removes_nothing_fails_the_checks_that_remove_something(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(LayerMask, "after_selection", lambda self, weights, indices: weights)
    assert failed(verify(model, sequence)) == ["no stale state", "inactive expert", "effects are exact"]


@UNCHECKED
def test_losses_that_repeat_fail_the_third_check_alone(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model(qkv_bias=False, output_bias=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()  # without attention, a token alone decides its loss
    assert failed(verify(model, torch.full((1, 20), 7))) == ["losses differ"]


@UNCHECKED
def test_an_inactive_expert_with_an_effect_fails_the_fourth_check_alone(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    original = LayerMask.after_selection

    def leaking(self: LayerMask, weights: Tensor, indices: Tensor) -> Tensor:
        idle = ~self.keep.all(-1) & self.keep.gather(-1, indices).all(-1)
        return torch.where(idle.unsqueeze(-1), weights * 1.001, original(self, weights, indices))

    monkeypatch.setattr(LayerMask, "after_selection", leaking)
    assert failed(verify(model, sequence)) == ["inactive expert"]


@UNCHECKED
def test_an_effect_on_an_earlier_token_fails_the_fourth_check_alone(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    original = full_forwards.losses_without

    def backwards(model: HookedMoE, tokens: Tensor, *removals: Any) -> Steps[Tensor]:
        losses = yield from original(model, tokens, *removals)
        clean = yield from original(model, tokens)
        changed = (losses != clean)[0].nonzero().flatten().tolist()
        if changed and changed[0] > 0:
            losses[0, changed[0] - 1] += 1e-4
        return losses

    monkeypatch.setattr(verification, "losses_without", backwards)
    assert failed(verify(model, sequence)) == ["inactive expert"]


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@pytest.mark.parametrize("scope", ["position", "sequence", "from_position"])
def test_full_forwards_that_are_rows_of_one_are_those_of_one_each(
    scope: Any, removal: Any, model: HookedMoE, sequence: Tensor
) -> None:
    last = model.cfg.moe_layers[-1]
    places = [(layer, full_forwards.Removed(pos, slot, removal, scope)) for layer, pos, slot in ((last, 3, 0), (last, 17, 1))]
    places.append((model.cfg.moe_layers[0], full_forwards.Removed(0, 1, removal, scope)))
    with torch.inference_mode():
        rows = run_to_end(full_forwards.losses_of_rows(model, sequence, [None, *places]))
        experts = [removed.expert for _, removed in places]
        assert min(experts) >= 0
        apart = [run_to_end(full_forwards.losses_without(model, sequence))]
        apart += [run_to_end(full_forwards.losses_without(model, sequence, {layer: {0: removed}})) for layer, removed in places]
    assert [removed.expert for _, removed in places] == experts
    torch.testing.assert_close(rows, torch.cat(apart), atol=1e-5, rtol=0)
    assert all(float((row - rows[0]).abs().max()) > 0 for row in rows[1:])


@UNCHECKED
@pytest.mark.parametrize("wrong", [1e-3, -1e-3, float("nan"), float("inf")])
def test_fast_effects_that_are_off_fail_the_fifth_check_alone(
    model: HookedMoE, wrong: float, sequence: Tensor, monkeypatch: Patch
) -> None:
    original = verification.expert_effects

    def off(*inputs: Any, **options: Any) -> Steps[Any]:
        effects = yield from original.steps(*inputs, **options)
        return dataclasses.replace(effects, delta_loss=effects.delta_loss + wrong)

    monkeypatch.setattr(verification, "expert_effects", pausable(off))
    checks = verify(model, sequence)
    assert failed(checks) == ["effects are exact"]
    assert not checks[-1].value < 9e-4


@UNCHECKED
@pytest.mark.parametrize("architecture", ["qwen", "deepseek"])
@pytest.mark.parametrize("removal", ["zero", "renormalize"])
def test_fast_effects_that_forget_the_shared_experts_fail_the_fifth_check_alone(
    model: HookedMoE, removal: Any, sequence: Tensor, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(removals, "combine_onto", lambda resid, outputs, kept, shared: combine_onto(resid, outputs, kept, None))
    assert failed(verify(model, sequence, removal)) == ["effects are exact"]


@UNCHECKED
@pytest.mark.parametrize("fault", ["reroute", "sequence"])
def test_effects_are_compared_for_the_removal_and_the_scopes_to_be_measured(
    model: HookedMoE, fault: str, sequence: Tensor, monkeypatch: Patch
) -> None:
    original = verification.expert_effects

    def off(
        model: HookedMoE, tokens: Tensor, layers: Any = None, scope: Any = "position", removal: str = "zero", **rest: Any
    ) -> Steps[Any]:
        effects = yield from original.steps(model, tokens, layers, scope, removal, **rest)
        return dataclasses.replace(effects, delta_loss=effects.delta_loss + (1e-3 if fault in (scope, removal) else 0))

    monkeypatch.setattr(verification, "expert_effects", pausable(off))
    assert failed(verify(model, sequence)) == []
    asked = {"reroute": ("reroute", ("position",)), "sequence": ("zero", ("position", "sequence"))}[fault]
    found = {"reroute": "effects are exact", "sequence": "effects are exact, sequence-wide"}[fault]
    assert failed(verify(model, sequence, *asked)) == [found]  # type: ignore[arg-type]


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("fault", ["at the position only", "one token too many", "everywhere"])
def test_effects_that_stop_or_go_too_far_fail_from_the_position_on(
    model: HookedMoE, fault: str, sequence: Tensor, monkeypatch: Patch
) -> None:
    """An engine that restores the expert after the position, removes another one too, or whatever expert serves a later token."""
    original = expert_removal.each_slot_removed_from_here_on

    def faulty(clean: Any, width: int) -> Tensor:
        keep = original(clean, width).unflatten(2, (-1, width)).clone()
        if fault == "at the position only":
            keep[..., 1:, :] = True
        elif fault == "everywhere":
            keep[..., 1:, :] = False
        else:
            keep[..., 2, 0] = False
        return keep.flatten(2, 3)

    monkeypatch.setattr(expert_removal, "each_slot_removed_from_here_on", faulty)
    assert failed(verify(model, sequence, "zero", ("from_position",))) == [FROM_POSITION]
    assert failed(verify(model, sequence)) == []  # nothing is amiss at the position itself


def test_losses_of_later_tokens_that_are_not_read_fail_from_the_position_on(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    original = LossAfter.__call__
    monkeypatch.setattr(LossAfter, "__call__", lambda self, final: original(self, final) * torch.tensor([1.0, *[math.nan] * 4]))
    assert failed(verify(model, sequence, "zero", ("from_position",))) == [FROM_POSITION]


@UNCHECKED
def test_a_model_without_effects_at_all_does_not_pass(make_model: Callable[..., HookedMoE], sequence: Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        model.unembed.W_U.zero_()
    assert failed(verify(model, sequence)) == ["no stale state", "losses differ", "inactive expert"]


@UNCHECKED
def test_a_model_of_nan_passes_none_of_the_checks(make_model: Callable[..., HookedMoE], sequence: Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        model.ln_final.w.fill_(float("nan"))
    assert failed(verify(model, sequence)) == CHECKS


# --- as a budgeted run makes removals: single ones ------------------------------------------------------------------


@EVERY_ARCHITECTURE
def test_effects_made_alone_are_verified_where_a_run_makes_them_so(
    model: HookedMoE, sequence: Tensor, monkeypatch: Patch
) -> None:
    assert failed(verify(model, sequence, picked=True)) == []
    original = expert_removal.PickedRemovals.branch

    def off(self: Any, clean: Any, ways: Tensor) -> Any:
        return original(self, clean, ways) * 1.01

    monkeypatch.setattr(expert_removal.PickedRemovals, "branch", off)
    assert failed(verify(model, sequence, picked=True)) == ["effects are exact"]
    assert failed(verify(model, sequence)) == []


def test_only_what_is_compared_is_made_alone(model: HookedMoE, sequence: Tensor, monkeypatch: Patch) -> None:
    made: list[int] = []
    original = verification.expert_effects

    def counted(*inputs: Any, **options: Any) -> Steps[Any]:
        effects = yield from original.steps(*inputs, **options)
        made.append(int((~effects.delta_loss.isnan()).sum()))
        return effects

    monkeypatch.setattr(verification, "expert_effects", pausable(counted))
    verify(model, sequence, picked=True, products="bfloat16")
    last_layer_alone, exact, *products = made
    assert last_layer_alone == (sequence.shape[1] - 1) * model.cfg.experts_per_token
    assert exact <= 12
    assert len(products) == 2
    assert products[0] == products[1] <= verification.PICKED_FOR_PRODUCTS


# --- noise floor and fingerprint -------------------------------------------------------------------------------------


@EVERY_ARCHITECTURE
def test_the_noise_floor_is_what_removing_nothing_seems_to_do(model: HookedMoE, tokens: Tensor, monkeypatch: Patch) -> None:
    for batch in (tokens, tokens[:1]):
        assert 0 <= noise_floor(model, batch) < 1e-5
    original = Zero.without
    monkeypatch.setattr(Zero, "without", lambda self, clean, keep: original(self, clean, keep) * 1.01)
    assert noise_floor(model, tokens) > 1e-4


@EVERY_ARCHITECTURE
def test_every_layer_with_experts_counts_towards_the_noise_floor(model: HookedMoE, tokens: Tensor, monkeypatch: Patch) -> None:
    original = Zero.without
    for layer in model.cfg.moe_layers:
        monkeypatch.setattr(
            Zero,
            "without",
            lambda self, clean, keep, layer=layer: original(self, clean, keep) + (0.01 if clean.layer == layer else 0),
        )
        assert noise_floor(model, tokens) > 1e-4, layer


def test_the_checksum_of_weights_is_of_their_names_types_shapes_and_bytes(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model(n_layers=1)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode() + parameter.detach().numpy().tobytes())
    before = weights_sha256(model)
    assert before == digest.hexdigest()
    assert weights_sha256(make_model(n_layers=1)) == before
    with torch.no_grad():
        model.unembed.W_U[-1, -1] = torch.nextafter(model.unembed.W_U[-1, -1], torch.tensor(9.0))
    assert weights_sha256(model) != before
    assert weights_sha256(make_model(n_layers=1, dtype=torch.bfloat16)) not in (before, weights_sha256(model))


def test_the_configuration_and_the_versions_are_json(model: HookedMoE) -> None:
    values = json.loads(json.dumps(config_values(model.cfg)))
    assert values["num_experts"] == 6
    assert values["dtype"] == "torch.float32"
    assert values["device"] == "cpu"
    assert {"hooked_moe", "python", "torch", "numpy"} <= versions().keys()
    assert versions()["torch"] == torch.__version__
