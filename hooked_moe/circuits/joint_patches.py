"""Heads and experts patched together: in every variant a set of them has the clean run's contributions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.circuits.gradients import block_gradients, direct_gradients
from hooked_moe.circuits.metrics import metric_changes
from hooked_moe.circuits.pairs import PromptPair
from hooked_moe.circuits.paths import sent
from hooked_moe.hooks.hook_point import HookPoint

HeadOrExpert = tuple[str, int, int]
"""("head", layer, head) or ("expert", layer, expert)."""
FINAL_BYTES = 1 << 26
"""Bytes of residual streams that go through the layers together."""


def all_nodes(pair: PromptPair, asked: Bool[Tensor, "batch pos"]) -> list[HeadOrExpert]:
    """Every head, and every expert that either run routes one of these tokens to."""
    nodes: list[HeadOrExpert] = []
    for layer in range(pair.model.cfg.n_layers):
        nodes += [("head", layer, head) for head in range(pair.model.cfg.n_heads)]
        if pair.model.cfg.experts_in(layer):
            used = torch.cat([pair.experts(run, layer).indices[asked].flatten() for run in ("clean", "corrupt")]).unique()
            nodes += [("expert", layer, expert) for expert in used.tolist()]
    return nodes


def scores_of_nodes(
    pair: PromptPair, nodes: Sequence[HeadOrExpert], metric: Any, asked: Bool[Tensor, "batch pos"], direct: bool
) -> Float[Tensor, " node"]:
    """First order of every node's patch, or its direct effect, as the mean over rows."""
    if direct:
        after = middle = dict.fromkeys(range(pair.model.cfg.n_layers), direct_gradients(pair, metric))
    else:
        after, middle = block_gradients(pair, metric)
    scores = [
        ((sent(pair, node) * (middle if node[0] == "head" else after)[node[1]]).sum(-1) * asked).sum(-1).mean() for node in nodes
    ]
    return torch.stack(scores)


def joint_effects(
    pair: PromptPair, sets: Sequence[Sequence[HeadOrExpert]], metric: Any, asked: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "set batch"]:
    """The metric with each set patched, minus that of the corrupted run."""
    row = pair.tokens.numel() * pair.model.cfg.d_model * 4
    at_once = max(1, FINAL_BYTES // row)
    parts = [sets[first : first + at_once] for first in range(0, len(sets), at_once)]
    return torch.cat([metric_changes(pair, metric, _finals(pair, part, asked)) for part in parts])


def _finals(
    pair: PromptPair, sets: Sequence[Sequence[HeadOrExpert]], asked: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "set batch pos d_model"]:
    """Last residual streams: every set is a copy of the batch, in one forward."""
    model, embed = pair.model, pair.activations("corrupt")["hook_embed"]
    hooks: list[Any] = []
    for layer in range(model.cfg.n_layers):
        chosen = {kind: [[node[2] for node in one if node[:2] == (kind, layer)] for one in sets] for kind in ("head", "expert")}
        if any(chosen["head"]):
            heads = _members(chosen["head"], model.cfg.n_heads, embed)
            hooks.append((f"blocks.{layer}.attn.hook_z", partial(_clean_heads, pair, layer, heads, asked)))
        if any(chosen["expert"]):
            experts = _members(chosen["expert"], model.cfg.experts_in(layer), embed)
            hooks += _clean_experts(pair, layer, experts, asked)
    mask = None if pair.attention_mask is None else pair.attention_mask.repeat(len(sets), 1)
    with model.hooks(hooks):
        final = model(embed.repeat(len(sets), 1, 1), start_at_layer=0, stop_at_layer=model.cfg.n_layers, attention_mask=mask)
    return final.unflatten(0, (len(sets), -1))


def _members(chosen: list[list[int]], count: int, like: Tensor) -> Bool[Tensor, "set member"]:
    members = torch.zeros(len(chosen), count, dtype=torch.bool, device=like.device)
    for number, own in enumerate(chosen):
        members[number, own] = True
    return members


def _clean_heads(
    pair: PromptPair,
    layer: int,
    heads: Bool[Tensor, "set head"],
    asked: Bool[Tensor, "batch pos"],
    z: Float[Tensor, "row pos head d_value"],
    hook: HookPoint,
) -> Float[Tensor, "row pos head d_value"]:
    by_set = z.unflatten(0, (len(heads), -1))
    patched = heads[:, None, None, :, None] & asked[None, :, :, None, None]
    return torch.where(patched, pair.z("clean", layer), by_set).flatten(0, 1)


def _clean_experts(
    pair: PromptPair, layer: int, experts: Bool[Tensor, "set expert"], asked: Bool[Tensor, "batch pos"]
) -> list[tuple[str, Any]]:
    """Hooks that take the variants' own contributions of these experts out of the routed sum, and put the clean run's in."""
    clean, own = pair.experts("clean", layer), {}
    in_clean = experts[:, clean.indices] & asked[None, ..., None]
    weights = torch.where(in_clean, clean.weights, 0.0)
    added = torch.einsum("sbpk,bpkd->sbpd", weights, clean.outputs)

    def keep(x: Tensor, hook: HookPoint) -> None:
        own[hook.name.rsplit("_", 1)[1]] = x

    def exchange(routed: Float[Tensor, "row pos d_model"], hook: HookPoint) -> Float[Tensor, "row pos d_model"]:
        sets = torch.arange(len(experts), device=routed.device)[:, None, None, None]
        indices, own_weights = (own[name].unflatten(0, (len(experts), -1)) for name in ("indices", "weights"))
        removed = experts[sets, indices] & asked[None, ..., None]
        taken = torch.where(removed, own_weights, 0.0).flatten(0, 1)
        return routed - (taken.unsqueeze(-1) * own["out"]).sum(2) + added.flatten(0, 1)

    prefix = f"blocks.{layer}.mlp.hook_"
    reads = [(f"{prefix}expert_{name}", keep) for name in ("indices", "weights", "out")]
    return [*reads, (prefix + "routed_out", exchange)]
