"""Experts removed for good: the same model with their router logits at minus infinity, here and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.hooks.hook_table import declared_names
from hooked_moe.surgery import without_experts
from tests.conftest import random_model
from tests.support.hf_models import logits_of
from weights_conversion import CheckpointError

SHARED = {"dense_layers": (1,), "d_mlp": 20, "d_shared": 10, "shared_gate": True, "routed_scaling_factor": 1.5}
SAVEABLE: dict[str, dict[str, Any]] = {
    "olmoe": {"model_type": "olmoe", "d_head": 8},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "qk_norm": None,
        "clip_qkv": None,
        "output_bias": False,
        **SHARED,
        "routed_scaling_factor": 1.0,
    },
}


BY_SIGMOIDS = {"architecture": "glm", "n_expert_groups": 1, "groups_per_token": 1, "dense_layers": (), "d_mlp": None}
PRUNED = {
    "plain": {},
    "renormalised": {"norm_topk_prob": True},
    "shared and dense": SHARED,
    "by sigmoids and a bias": BY_SIGMOIDS,
    "biased experts": {"architecture": "gpt-oss"},
}


def without(experts: dict[int, list[int]]) -> tuple[Callable[[str], bool], Callable[..., Tensor]]:
    """A hook that takes the probability of these experts away, and what would have them selected without it."""

    def edit(logits_or_bias: Tensor, hook: Any) -> Tensor:
        logits_or_bias[..., experts.get(hook.layer(), [])] = -torch.inf
        return logits_or_bias

    return (lambda name: name.endswith(("hook_router_logits", "hook_selection_bias"))), edit


@pytest.mark.parametrize("options", PRUNED.values(), ids=PRUNED)
def test_the_pruned_model_is_the_one_whose_router_never_chooses_them(options: dict[str, Any], tokens: Tensor) -> None:
    model, pruned = random_model(**options), random_model(**options)
    removed = {0: [1, 4], 2: [5, 0, 3]}
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[without(removed)])
        kept = pruned.remove_experts(removed)
        torch.testing.assert_close(pruned(tokens), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, model(tokens), atol=1e-3)
    assert kept == {0: [0, 2, 3, 5], 2: [1, 2, 4]}
    assert [pruned.cfg.experts_in(layer) for layer in (0, 2)] == [4, 3]
    assert set(pruned.hook_dict) == set(declared_names(pruned.cfg))
    assert pruned.blocks[2].mlp.router.W.shape == (3, 32)


def test_a_pruned_model_is_a_whole_one(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    model = make_model()
    model.remove_experts({0: [2]})
    effects = expert_effects(model, tokens)
    assert int(effects.expert_index[0].max()) == 4
    _, cache = model.run_with_cache(tokens)
    assert cache["router_logits", 0].shape[-1] == 5
    assert cache["router_logits", 1].shape[-1] == 6
    model(tokens, return_type="loss").backward()
    assert model.blocks[0].mlp.experts.W_in.grad.shape[0] == 5
    assert model.remove_experts({0: [0], 1: [1]}) == {0: [1, 2, 3, 4], 1: [0, 2, 3, 4, 5]}


@pytest.mark.parametrize("options", [{}, SHARED], ids=["plain", "shared and dense"])
def test_for_the_length_of_a_block_it_is_pruned_and_then_it_is_what_it_was(options: dict[str, Any], tokens: Tensor) -> None:
    model, pruned = random_model(**options), random_model(**options)
    names, parameters = list(model.hook_dict), {name: id(value) for name, value in model.named_parameters()}
    cfg, removed = model.cfg, {0: [1, 4], 2: [5]}
    pruned.remove_experts(removed)
    with torch.no_grad():
        before = model(tokens)
        with without_experts(model, removed) as inside:
            assert torch.equal(inside(tokens), pruned(tokens))
            assert (inside.cfg, set(inside.hook_dict)) == (pruned.cfg, set(pruned.hook_dict))
            shared = {id(value) for value in inside.parameters()} & {*parameters.values()}
            assert len(shared) == len(parameters) - 3 * len(removed)  # all but router and experts of the pruned layers
        assert torch.equal(model(tokens), before)
    assert (list(model.hook_dict), model.cfg) == (names, cfg)
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    _, cache = model.run_with_cache(tokens)
    assert cache["router_logits", 0].shape[-1] == 6


def test_the_experts_come_back_after_an_error_and_none_go_for_a_wrong_one(tokens: Tensor) -> None:
    model = random_model(**SHARED)
    before = model(tokens)
    with pytest.raises(RuntimeError, match="inside"), without_experts(model, {0: [1]}):
        raise RuntimeError("inside")
    for wrong, message in (({0: [6]}, "expert 6 cannot be removed"), ({0: [1], 1: [0]}, "layer 1 has no experts")):
        with pytest.raises(ValueError, match=message), without_experts(model, wrong):
            pytest.fail("entered")
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("family", SAVEABLE)
def test_as_many_from_every_layer_make_a_checkpoint_for_transformers(family: str, tokens: Tensor, tmp_path: Path) -> None:
    model = random_model(**SAVEABLE[family])
    model.remove_experts({layer: [layer, 5 - layer] for layer in model.cfg.moe_layers})
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
        torch.testing.assert_close(logits_of(reference, tokens), model(tokens), atol=5e-5, rtol=0)
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(tokens), model(tokens))


def test_unequal_numbers_cannot_be_saved_and_the_error_says_which(tmp_path: Path) -> None:
    model = random_model()
    model.remove_experts({1: [0]})
    with pytest.raises(CheckpointError, match=r"one number of experts for all layers, and this model has \(6, 5, 6\)"):
        model.save_pretrained(tmp_path)
    model.remove_experts({0: [0], 2: [0]})
    model.save_pretrained(tmp_path)
    assert HookedMoE.from_pretrained(tmp_path).cfg.num_experts == 5


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({3: [0]}, r"layer 3 has no experts to remove: layers \[0, 2\] have"),
        ({1: [0]}, r"layer 1 has no experts"),
        ({0: [6]}, r"expert 6 cannot be removed: layer 0 has experts 0 to 5"),
        ({0: [-1]}, r"expert -1 cannot be removed"),
        ({2: [1], 0: [0, 1, 2, 3]}, r"a token goes to 3 experts of layer 0, and only 2 of 6 would remain"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_changes(experts: dict[int, list[int]], message: str) -> None:
    model = random_model(**SHARED)
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        model.remove_experts(experts)
    assert model.cfg == random_model(**SHARED).cfg
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_hooks_and_groups_stand_in_the_way() -> None:
    model = random_model()
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: None)
    with pytest.raises(ValueError, match=r"blocks.0.hook_mlp_out has hooks"):
        model.remove_experts({0: [0]})
    with pytest.raises(ValueError, match="in 2 groups of equal size"):
        random_model(n_expert_groups=2).remove_experts({0: [0]})


EXPERTS_GIVEN: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor([3.0, 0.5, 2.0, 0.1, 4.0, 5.0]).topk(2, largest=False).indices,
    "0-d tensors": lambda: list(torch.tensor([3, 1])),
    "array": lambda: np.array([1, 3], dtype=np.int32),
    "mask": lambda: torch.tensor([False, True, False, True, False, False]),
    "generator": lambda: (expert for expert in (1, 3)),
    "filter": lambda: filter(lambda expert: expert in (1, 3), range(6)),
    "keys": lambda: {1: "", 3: ""}.keys(),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [2, np.int64(2), torch.tensor(2)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("given", EXPERTS_GIVEN)
def test_experts_and_layers_are_numbers_whatever_holds_them(given: str, layer: Any, tokens: Tensor) -> None:
    """A tensor that holds 3 is not 3 to a set or a dictionary: nothing would be removed."""
    expected, model = random_model(), random_model()
    expected.remove_experts({2: [1, 3]})
    with torch.no_grad(), without_experts(model, {layer: EXPERTS_GIVEN[given]()}) as pruned:
        assert torch.equal(pruned(tokens), expected(tokens))
    assert model.remove_experts({layer: EXPERTS_GIVEN[given]()}) == {2: [0, 2, 4, 5]}
    assert torch.equal(model(tokens), expected(tokens))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({2: torch.tensor([1.0, 3.0])}, "the experts of layer 2 must be whole numbers, not 1.0"),
        ({2: [True, False]}, "the experts of layer 2 must be whole numbers, not True"),
        ({2: 3}, r"the experts of layer 2 must be a list of whole numbers, as in \[3\], not the number 3"),
        ({2: torch.ones(5, dtype=torch.bool)}, "must have 6 entries"),
        ({2.0: [1]}, "a layer must be a whole number, not 2.0"),
        ({2: [1], torch.tensor(2): [3]}, "layer 2 is there twice"),
        ([(2, [1])], r"expected a mapping, \{layer: ...\}, not"),
        ({2: "13"}, "must be a list of whole numbers, .* not '13'"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value),
)
def test_what_names_no_experts_is_refused(experts: Any, message: str, model: HookedMoE) -> None:
    for remove in (model.remove_experts, lambda experts: without_experts(model, experts).__enter__()):
        with pytest.raises(ValueError, match=message):
            remove(experts)
