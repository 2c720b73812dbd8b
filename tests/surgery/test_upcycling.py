"""Upcycling, against the dense model that it starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.components.moe import MoE
from hooked_moe.surgery import upcycle
from tests.conftest import random_config, random_model

ONE_EXPERT = {"num_experts": 1, "experts_per_token": 1, "norm_topk_prob": True}


@pytest.fixture
def dense() -> HookedMoE:
    return random_model(**ONE_EXPERT)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 6, "experts_per_token": 6, "norm_topk_prob": False},
        {"num_experts": 6, "experts_per_token": 2, "norm_topk_prob": False},
        {"num_experts": 6, "experts_per_token": 2},
        {"num_experts": 6, "experts_per_token": 2, "d_expert": 8, "d_shared": 4},
        {"num_experts": 6, "experts_per_token": 2, "dense_layers": (0,), "d_mlp": 12},
        {"num_experts": 6, "experts_per_token": 2, "routed_scaling_factor": 1.5},
    ],
    ids=["all experts", "not renormalised", "renormalised", "shared", "first layer dense", "scaled"],
)
@torch.no_grad()
def test_copies_without_noise_compute_what_the_dense_model_does(
    dense: HookedMoE, tokens: torch.Tensor, changes: dict[str, Any]
) -> None:
    model = upcycle(dense, dense.cfg.replace(**changes), noise=0.0)
    if not model.cfg.norm_topk_prob:
        for block in model.blocks:
            assert isinstance(block.mlp, MoE)
            block.mlp.router.W.zero_()  # the router without preferences that the scale is made for
    torch.testing.assert_close(model(tokens), dense(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ({"router_score": "sigmoid"}, {"norm_topk_prob": False}),
        ({"router_score": "sigmoid"}, {}),
        ({}, {"d_expert": 8, "d_shared": 4, "shared_gate": True}),
    ],
    ids=["sigmoids", "sigmoids, renormalised", "shared behind a gate"],
)
@torch.no_grad()
def test_without_preferences_every_kind_of_router_and_gate_computes_the_same(
    router: dict[str, Any], changes: dict[str, Any], tokens: torch.Tensor
) -> None:
    dense = random_model(**ONE_EXPERT, **router)
    model = upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2, **changes), noise=0.0)
    for block in model.blocks:
        block.mlp.router.W.zero_()
        if block.mlp.W_shared_gate is not None:
            block.mlp.W_shared_gate.zero_()
    torch.testing.assert_close(model(tokens), dense(tokens), atol=1e-4, rtol=1e-4)


def test_the_seed_determines_the_model_and_leaves_torchs_alone(dense: HookedMoE) -> None:
    cfg = dense.cfg.replace(num_experts=6, experts_per_token=2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = upcycle(dense, cfg, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    other = upcycle(dense, cfg, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_double_precision_stays() -> None:
    dense = random_model(**ONE_EXPERT, dtype=torch.float64)
    model = upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2), noise=0.0)
    assert torch.equal(model.embed.W_E, dense.embed.W_E)
    assert torch.equal(model.blocks[0].mlp.experts.W_in[4], dense.blocks[0].mlp.experts.W_in[0])


@torch.no_grad()
def test_narrow_experts_are_subsets_of_neurons_that_are_right_on_average(dense: HookedMoE, tokens: torch.Tensor) -> None:
    model = upcycle(
        dense, dense.cfg.replace(num_experts=1500, experts_per_token=1500, d_expert=4, norm_topk_prob=False), noise=0.0
    )
    gate = dense.blocks[0].mlp.experts.W_in[0, 0]
    for expert in (0, 1):
        rows = model.blocks[0].mlp.experts.W_in[expert, 0]
        matches = (rows[:, None] == gate[None]).all(-1)
        assert matches.sum(1).tolist() == [1, 1, 1, 1]
        assert matches.sum(0).max() == 1
    assert not torch.equal(model.blocks[0].mlp.experts.W_in[0], model.blocks[0].mlp.experts.W_in[1])
    for block in model.blocks:
        block.mlp.router.W.zero_()
    torch.testing.assert_close(model(tokens), dense(tokens), atol=0.8, rtol=0.1)  # of logits of about 10


@torch.no_grad()
def test_noise_parts_the_experts_by_its_size_and_repeats_for_a_seed(dense: HookedMoE) -> None:
    cfg = dense.cfg.replace(num_experts=6, experts_per_token=2)
    experts = upcycle(dense, cfg, noise=0.05).blocks[1].mlp.experts.W_in
    deviation = (experts / dense.blocks[1].mlp.experts.W_in - 1).flatten(1)
    assert deviation.std().item() == pytest.approx(0.05, rel=0.15)
    again, other = (upcycle(dense, cfg, noise=0.05, seed=seed).blocks[1].mlp.experts.W_in for seed in (0, 1))
    assert torch.equal(experts, again)
    assert not torch.equal(experts, other)


def test_all_that_is_no_mlp_is_the_dense_models(dense: HookedMoE) -> None:
    model = upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2))
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in dense.named_parameters() if ".mlp." not in name)


def test_a_dense_layer_is_a_source_too() -> None:
    source = random_model(num_experts=1, experts_per_token=1, norm_topk_prob=True, dense_layers=(1,), d_mlp=12)
    model = upcycle(source, source.cfg.replace(num_experts=6, experts_per_token=2, dense_layers=(), d_mlp=None), noise=0.0)
    assert torch.equal(model.blocks[1].mlp.experts.W_in[4, 0], source.blocks[1].mlp.W_gate)


def test_what_cannot_be_upcycled_is_refused(dense: HookedMoE) -> None:
    with pytest.raises(ValueError, match="experts with biases"):
        upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2, expert_bias=True))
    with pytest.raises(ValueError, match="d_model=32, the new config 16"):
        upcycle(dense, random_config(d_model=16))
    with pytest.raises(ValueError, match="layer 0 of the dense model is a mixture of 6 experts"):
        upcycle(random_model(), random_config())
    with pytest.raises(ValueError, match="experts of 10 neurons beside 4 shared ones need as many; the dense MLP has 12"):
        upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2, d_expert=10, d_shared=4))
    with pytest.raises(ValueError, match="has 12 neurons, and d_mlp is 20"):
        upcycle(dense, dense.cfg.replace(num_experts=6, experts_per_token=2, dense_layers=(0,), d_mlp=20))
