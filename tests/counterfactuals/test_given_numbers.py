"""Layers, positions, masks and tokens are what they say, in whatever containers they come; the effects are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.counterfactuals import (
    KL,
    LogitDifference,
    LossAfter,
    Mean,
    expert_effects,
    expert_means,
    expert_observations,
    first_order_effects,
    mask_effects,
    progressive_effects,
    token_effects,
)

Ask = Callable[[HookedMoE, Tensor, Any], Tensor]


def post(clean: Any, queries: Any) -> Tensor:
    return 2 * clean.resid_post[None]


BY_LAYERS: dict[str, Ask] = {
    "expert_effects": lambda m, t, given: expert_effects(m, t, given).delta_loss,
    "progressive_effects": lambda m, t, given: progressive_effects(m, t, given).delta_loss,
    "first_order_effects": lambda m, t, given: first_order_effects(m, t, given).first_order,
    "expert_observations": lambda m, t, given: expert_observations(m, t, given).gap_norm,
    "token_effects": lambda m, t, given: token_effects(m, t, post, layers=given).delta_loss,
}
SOME: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor([2, 1]),
    "array": lambda: np.array([1, 2], dtype=np.uint8),
    "0-d tensors": lambda: list(torch.tensor([1, 2])),
    "generator": lambda: (number for number in (1, 2)),
    "keys": lambda: {1: 0, 2: 0}.keys(),
    "mask": lambda: torch.tensor([False, True, True]),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ask", BY_LAYERS)
def test_layers_come_in_any_container(ask: str, model: HookedMoE, tokens: Tensor) -> None:
    expected = BY_LAYERS[ask](model, tokens, [1, 2])
    assert len(expected) == 2
    for kind, given in SOME.items():
        torch.testing.assert_close(BY_LAYERS[ask](model, tokens, given()), expected, equal_nan=True, rtol=0, atol=0, msg=kind)
    for wrong in (torch.tensor([1.0, 2.0]), [True], {1: 2}, "12", torch.tensor(1), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^layers (must be|given as a bool mask must have 3 entries)"):
            BY_LAYERS[ask](model, tokens, wrong)


@pytest.mark.usefixtures("unchecked")
def test_positions_come_in_any_container(model: HookedMoE, tokens: Tensor) -> None:
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, [1, 2]] = True
    expected = expert_effects(model, tokens, positions=[1, 2]).delta_loss
    for given in (*(given() for kind, given in SOME.items() if kind != "mask"), mask, mask.numpy(), mask.tolist()):
        torch.testing.assert_close(expert_effects(model, tokens, positions=given).delta_loss, expected, equal_nan=True)
    for wrong in (torch.tensor([1.0]), [True, False], 1, slice(3), {1: 2}):
        with pytest.raises(ValueError, match=r"positions must be .*; they are valid in every row, or give a bool mask"):
            expert_effects(model, tokens, positions=wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [np.int64(2), torch.tensor(2)], ids=lambda layer: type(layer).__name__)
def test_masks_and_means_are_found_by_whatever_number_names_their_layer(layer: Any, model: HookedMoE, tokens: Tensor) -> None:
    keep = torch.ones(6, dtype=torch.bool)
    keep[3] = False
    expected = mask_effects(model, tokens, {2: keep}).delta_loss
    torch.testing.assert_close(mask_effects(model, tokens, {layer: keep}).delta_loss, expected, equal_nan=True)
    with torch.no_grad():
        masked = model(tokens, expert_mask=ExpertMask({2: keep}))
        assert not torch.equal(masked, model(tokens))
        assert torch.equal(model(tokens, expert_mask=ExpertMask({layer: keep})), masked)
    means = expert_means(model, tokens)
    by_mean = expert_effects(model, tokens, [2], removal=Mean(means)).delta_loss
    given = expert_effects(model, tokens, [2], removal=Mean({layer: means[2]})).delta_loss
    torch.testing.assert_close(given, by_mean, equal_nan=True)
    for wrong in ({2.0: keep}, {True: keep}, {2: keep, torch.tensor(2): keep}, [keep], keep):
        for build in (ExpertMask, lambda masks: mask_effects(model, tokens, masks)):
            with pytest.raises(ValueError, match=r"a layer must be|is there twice|expected a mapping"):
                build(wrong)


@pytest.mark.usefixtures("unchecked")
def test_single_removals_are_named_by_any_numbers(model: HookedMoE, tokens: Tensor) -> None:
    expected = ExpertMask.ablate([(2, 0, 5, 3)]).for_layer(2, (2, 11, 6), torch.device("cpu"))
    entries = torch.tensor([[2, 0, 5, 3]])
    for given in (entries, entries.numpy(), map(tuple, entries), iter(entries.tolist()), [iter((2, 0, 5, 3))]):
        mask = ExpertMask.ablate(given).for_layer(2, (2, 11, 6), torch.device("cpu"))
        assert mask is not None
        assert expected is not None
        assert torch.equal(mask.keep, expected.keep)
    for wrong in ((2, 0, 5, 3), [(2, 0, True, 3)], [(2.0, 0, 5, 3)], entries.double(), None, {2: 3}):
        with pytest.raises(ValueError, match=r"must be whole numbers from 0|must be a list"):
            ExpertMask.ablate(wrong)


@pytest.mark.usefixtures("unchecked")
def test_counts_and_seeds_are_whole_numbers(model: HookedMoE, tokens: Tensor) -> None:
    def after(count: Any) -> Tensor:
        return expert_effects(model, tokens, [2], readouts=iter([LossAfter(count)])).readouts["loss_after"]

    def ordered(seed: Any) -> Tensor:
        return progressive_effects(model, tokens, [2], "random", seed=seed).delta_loss

    seed = 9_000_000_000_000  # times a prime, it leaves the range of numpy's numbers, which wrap around
    for number in (np.int64, torch.tensor):
        torch.testing.assert_close(after(number(2)), after(2), equal_nan=True)
        torch.testing.assert_close(ordered(number(seed)), ordered(seed), equal_nan=True)
        assert token_effects(model, tokens, post, number(1), [2]).delta_loss.shape == (1, 1, 2, 11)
    for wrong in (2.0, True, None, torch.tensor([2])):
        with pytest.raises(ValueError, match="whole number"):
            after(wrong)
        with pytest.raises(ValueError, match="seed must be a whole number"):
            ordered(wrong)
    for token in (np.int32(7), torch.tensor(7)):
        torch.testing.assert_close(
            expert_effects(model, tokens, [2], readouts=[LogitDifference(token, 3)]).readouts["logit_difference"],
            expert_effects(model, tokens, [2], readouts=[LogitDifference(7, 3)]).readouts["logit_difference"],
            equal_nan=True,
        )


@pytest.mark.usefixtures("unchecked")
def test_an_entry_of_a_table_is_named_by_any_numbers(model: HookedMoE, tokens: Tensor) -> None:
    effects = expert_effects(model, tokens)
    expert = effects.expert_index[1, 0, 4, 0]
    assert effects.at(torch.tensor(1), np.int64(0), np.int8(4), expert) == effects.at(1, 0, 4, int(expert))
    for wrong in (1.0, True, None):
        with pytest.raises(ValueError, match="layer must be a whole number"):
            effects.at(wrong, 0, 4, 0)


@pytest.mark.usefixtures("unchecked")
def test_readouts_edits_and_references_are_taken_once(model: HookedMoE, tokens: Tensor) -> None:
    """From generators, which are empty the second time."""
    expected = expert_effects(model, tokens, [2], readouts=[KL(), LossAfter(1)]).readouts
    given = expert_effects(model, tokens, [2], readouts=(readout for readout in (KL(), LossAfter(1)))).readouts
    assert given.keys() == expected.keys()
    edits = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: 2 * x) for layer in range(3)]
    losses = model.run_variants(tokens, edits, return_type="loss")
    assert torch.equal(model.run_variants(tokens, iter(edits), return_type="loss"), losses)
    assert torch.equal(model.run_variants(tokens, (iter([edit]) for edit in edits), return_type="loss"), losses)
    for wrong in (dict(edits), None, 3):
        with pytest.raises(ValueError, match=r"edits must be a list, as in \[\(name, function\)\], not"):
            model.run_variants(tokens, wrong)
    with pytest.raises(ValueError, match=r"edit 0 must be a \(name, function\) pair"):
        model.run_variants(tokens, edits[0])  # one pair, not a list of them
    means = expert_means(model, [tokens[:1], tokens[1:]])
    for layer, mean in expert_means(model, (row[None] for row in tokens)).items():
        torch.testing.assert_close(mean, means[layer], equal_nan=True)
    for wrong in (None, 3, {"a": tokens}):
        with pytest.raises(ValueError, match="reference must be token ids, a text, or several of these"):
            expert_means(model, wrong)
