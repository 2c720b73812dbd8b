"""Lining up the experts of one training with those of another, whose numbering is arbitrary."""

from __future__ import annotations

import copy

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.components.moe import MoE
from hooked_moe.components.precision import without_autocast
from hooked_moe.surgery.grafting import Model, check_graftable
from hooked_moe.transformer import Transformer


@without_autocast()
def match_experts(a: Transformer, b: Transformer) -> dict[int, list[int]]:
    """For each layer, which expert of `b` stands for expert 0, 1, ... of `a`: the assignment that makes the cosines of their
    router rows largest in sum (the Hungarian algorithm).

    After Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836), for experts alone: neurons and heads stay as they are. Raises
    `ValueError` for models that cannot exchange parts, and for experts that stand in groups.
    """
    check_graftable(a, b)
    _refuse_groups(a)
    matched = {}
    for layer in a.cfg.moe_layers:
        rows, columns = scipy.optimize.linear_sum_assignment(
            _cosines(_router_rows(a, layer), _router_rows(b, layer)), maximize=True
        )
        assert rows.tolist() == sorted(rows.tolist())
        matched[layer] = columns.tolist()
    return matched


def align_experts(a: Transformer, b: Model) -> Model:
    """A copy of `b` whose experts are renumbered to stand where the nearest ones of `a` do (`match_experts`). It computes what
    `b` does."""
    return renumber_experts(b, match_experts(a, b))


@torch.inference_mode(False)
@torch.no_grad()
def renumber_experts(model: Model, order: dict[int, list[int]]) -> Model:
    """A copy of a model in which expert i of a layer is what was expert `order[layer][i]`. Raises `ValueError` for an order that
    is no permutation of a layer's experts, and for experts that stand in groups."""
    _refuse_groups(model)
    renumbered = copy.deepcopy(model)
    for layer, old in order.items():
        moe = renumbered.blocks[layer].mlp
        if not isinstance(moe, MoE) or sorted(old) != list(range(moe.num_experts)):
            raise ValueError(f"order of layer {layer}: give each of its experts once; layers {model.cfg.moe_layers} have experts")
        for parameter in (*moe.router.parameters(), *moe.experts.parameters()):  # all have an axis of experts first
            parameter.copy_(parameter[old].clone())
    return renumbered


def _refuse_groups(model: Transformer) -> None:
    if model.cfg.n_expert_groups > 1:
        raise ValueError(f"experts stand in {model.cfg.n_expert_groups} groups: renumbering them would change the routing")


def _router_rows(model: Transformer, layer: int) -> Float[Tensor, "expert d_model"]:
    moe = model.blocks[layer].mlp
    assert isinstance(moe, MoE)
    return moe.router.W.detach().float().cpu()


def _cosines(a: Float[Tensor, "expert d_model"], b: Float[Tensor, "expert d_model"]) -> Float[Tensor, "expert other"]:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
