"""Removing routed experts permanently, so that a pruned model can be saved and used elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from hooked_moe.checks import by_number, whole_numbers
from hooked_moe.components.moe import MoE
from hooked_moe.transformer import Transformer


@torch.inference_mode(False)
def remove_experts(model: Transformer, experts: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
    """Remove routed experts and their router rows, in place; `experts` maps a layer to the experts to remove.

    Experts are whole numbers in whatever holds them: a list, a tensor that topk gave, a bool mask of all experts of the layer.
    The router then chooses among the remaining experts, and a softmax runs over these: the same as a logit, and a selection bias,
    of minus infinity for the removed ones.
    Remaining experts are renumbered. Returns, for every layer given, the old numbers of those that remain, in their new order.

    Everything is checked before anything is changed. Raises `ValueError` for layers without experts, for experts that do not
    exist, where fewer would remain than a token goes to, for experts in groups, and while hooks are attached, since hook points
    are removed too.
    Parameters are replaced: an optimiser that was made before holds the old ones.
    """
    model.require_weights("removing experts")
    cfg = model.cfg
    hooked = [name for name, point in model.hook_dict.items() if point.active]
    if hooked:
        raise ValueError(f"{hooked[0]} has hooks: call model.reset_hooks(including_permanent=True) before experts are removed")
    if cfg.n_expert_groups > 1:
        raise ValueError(f"this model's experts stand in {cfg.n_expert_groups} groups of equal size: mask them instead")
    kept = {layer: _remaining(model, layer, removed) for layer, removed in _named(model, experts).items()}
    counts = [len(kept[layer]) if layer in kept else cfg.experts_in(layer) for layer in range(cfg.n_layers)]
    unequal = len({counts[layer] for layer in cfg.moe_layers}) > 1
    changed = cfg.replace(num_experts=max(counts), experts_by_layer=tuple(counts) if unequal else None)
    for layer, remaining in kept.items():
        moe = model.blocks[layer].mlp
        assert isinstance(moe, MoE)
        moe.keep_experts(remaining)
    model.cfg = changed
    model.name_hook_points()
    return kept


@contextmanager
def without_experts(model: Transformer, experts: Mapping[int, Iterable[int]]) -> Iterator[Transformer]:
    """The model as `remove_experts` leaves it for the length of a block, and as it was from then on.

    The pruned layers are copies that share all weights but those of the experts that remain. Raises what `remove_experts` raises.
    """
    named = _named(model, experts)
    for layer, removed in named.items():
        _remaining(model, layer, removed)
    cfg = model.cfg
    whole = {layer: model.blocks[layer].mlp for layer in named}
    try:
        for layer, moe in whole.items():
            shared = {id(parameter): parameter for parameter in moe.parameters()}
            model.blocks[layer].mlp = copy.deepcopy(moe, shared)
        model.name_hook_points()
        remove_experts(model, named)
        yield model
    finally:
        for layer, moe in whole.items():
            model.blocks[layer].mlp = moe
        model.cfg = cfg
        model.name_hook_points()


def _named(model: Transformer, experts: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
    """Layers and experts as plain numbers; whether they exist is another question."""
    counts = {layer: model.cfg.experts_in(layer) for layer in model.cfg.moe_layers}
    return {
        layer: whole_numbers(removed, f"the experts of layer {layer}", counts.get(layer))
        for layer, removed in by_number(experts, "layer").items()
    }


def _remaining(model: Transformer, layer: int, removed: list[int]) -> list[int]:
    """The experts of a layer that are not removed."""
    cfg = model.cfg
    if layer not in cfg.moe_layers:
        raise ValueError(f"layer {layer} has no experts to remove: layers {cfg.moe_layers} have")
    count = cfg.experts_in(layer)
    for expert in removed:
        if not 0 <= expert < count:
            raise ValueError(f"expert {expert} cannot be removed: layer {layer} has experts 0 to {count - 1}")
    gone = set(removed)
    remaining = [expert for expert in range(count) if expert not in gone]
    if len(remaining) < cfg.experts_per_token:
        raise ValueError(
            f"a token goes to {cfg.experts_per_token} experts of layer {layer}, and only {len(remaining)} of {count} would remain"
        )
    return remaining
