"""The terms of the sum that the residual stream is, each from what a cache has of its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_moe.hooks.caching import take

Components = tuple[Tensor, list[str]]
"""A stack [component, *batch_and_pos, d_model] and its labels."""


def term(label: str, activation: Tensor, pos_slice: Any) -> Components:
    """One component: the positions of an activation [..., pos, d_model]."""
    return take(activation, pos_slice, -2)[None], [label]


def mlp(cache: Any, layer: int, pos_slice: Any) -> Components:
    """The output of routed and shared experts together, or of the dense MLP."""
    return term(f"{layer}_mlp_out", cache["mlp_out", layer], pos_slice)


def heads(cache: Any, layer: int, pos_slice: Any) -> Components:
    """The heads of a layer, whose sum is the attention's output but for its bias."""
    name = f"blocks.{layer}.attn.hook_result"
    if name in cache:
        result = take(cache[name], pos_slice, -3)
    else:
        z, weight = take(cache["z", layer], pos_slice, -3), cache.model.blocks[layer].attn.W_O
        result = torch.einsum("...hv,dhv->...hd", z, weight)
    return result.movedim(-2, 0), [f"L{layer}H{head}" for head in range(result.shape[-2])]


def experts(cache: Any, layer: int, pos_slice: Any) -> Components:
    """The routed experts of a layer, each scattered from its slots, then the shared ones; or the dense MLP."""
    count = cache.model.cfg.experts_in(layer)
    if not count:
        return term(f"L{layer}mlp", cache["mlp_out", layer], pos_slice)
    outputs = take(cache["expert_out", layer], pos_slice, -3)
    weights, indices = (take(cache[name, layer], pos_slice, -2) for name in ("expert_weights", "expert_indices"))
    contributions = outputs * weights[..., None]
    stack = contributions.new_zeros(*contributions.shape[:-2], count, contributions.shape[-1])
    stack = stack.scatter_add(-2, indices[..., None].expand(contributions.shape), contributions).movedim(-2, 0)
    labels = [f"L{layer}E{expert}" for expert in range(count)]
    if cache.model.cfg.d_shared is None:
        return stack, labels
    shared = take(cache["shared_out", layer], pos_slice, -2)
    return torch.cat((stack, shared[None])), [*labels, f"L{layer}shared"]
