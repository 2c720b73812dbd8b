"""Activation patching with an expert axis: every expert of every token in every layer, one at a time, in one call.

_, clean_cache = model.run_with_cache(clean_tokens)
patches = get_act_patch_expert(model, corrupted_tokens, clean_cache, At(-1, LogitDifference(answer, foil)))
patches.values[layer, batch, pos, slot]; patches.plot()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.circuits.metrics import Metric, check_metric, effects_of_deltas, name_of, total_effect
from hooked_moe.circuits.pairs import (
    Clean,
    ExpertDeltas,
    Part,
    PromptPair,
    check_part,
    expert_deltas,
    padded_slots,
    prompt_pair,
)
from hooked_moe.circuits.results import ExpertPatches
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens, checked_layers
from hooked_moe.transformer import Transformer


@torch.no_grad()
@without_autocast()
def get_act_patch_expert(
    model: Transformer,
    corrupted_tokens: Tokens,
    clean_cache: Clean,
    metric: Metric,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    part: Part = "contribution",
    attention_mask: Mask | None = None,
    *,
    dense: bool = False,
    memory_budget: int | str | None = None,
) -> ExpertPatches:
    """Put each expert's part of the clean run into the corrupted run, one expert of one token at a time, and measure the metric.

    What is patched is the expert's contribution w E (weight times output; 0 where a run does not route the token to it), with
    part="content" what it writes at the clean run's weight, with "routing" its weight. Nothing is routed again at that token; all
    that follows is. `clean_cache` may also be the clean tokens or text, of the same lengths. `layers` None means all with
    experts; `positions` are indices valid in every row, or a bool mask [batch, pos]. `dense` has a slot for every expert.

    `metric` is a readout, such as `At(-1, LogitDifference(answer, foil))`, which is exact and takes the changed tokens alone
    through the later layers; or a function of the logits [batch, pos, d_vocab] that returns one number for each row, for which
    all tokens are run from the patched layer on. A readout without `At` is read at the patched token itself.

    The expert-axis form of TransformerLens's `get_act_patch_mlp_out`. Raises `ValueError` for runs of different lengths, for
    layers or positions out of range, for dense layers, and while hooks are attached.
    """
    check_part(part)
    chosen = checked_layers(model, layers)
    pair = prompt_pair(model, clean_cache, corrupted_tokens, attention_mask)
    check_metric(metric, pair)
    by_layer = aligned({layer: expert_deltas(pair, layer, part) for layer in chosen})
    deltas = {layer: experts.delta for layer, experts in by_layer.items()}
    values = effects_of_deltas(pair, deltas, metric, asked_positions(pair, positions), memory_budget)
    patches = as_patches(pair, by_layer, values, metric, part, "exact")
    return with_slot_per_expert(patches) if dense else patches


def asked_positions(pair: PromptPair, positions: Any) -> Bool[Tensor, "batch pos"]:
    """Where to measure. Raises `ValueError` for positions that do not fit."""
    packed = pack(pair.tokens, pair.attention_mask, positions)
    asked = torch.zeros_like(pair.tokens, dtype=torch.bool)
    row, query = packed.measured
    asked[row, packed.asked_positions()[row, query]] = True
    return asked


def aligned(by_layer: dict[int, ExpertDeltas]) -> dict[int, ExpertDeltas]:
    """As many slots in every layer as in the layer with most."""
    slots = max(deltas.experts.shape[-1] for deltas in by_layer.values())
    fills = (-1, 0.0, False, False)
    return {
        layer: ExpertDeltas(*(padded_slots(x, slots, fill) for x, fill in zip(deltas, fills, strict=True)))
        for layer, deltas in by_layer.items()
    }


def as_patches(
    pair: PromptPair,
    by_layer: dict[int, ExpertDeltas],
    values: Float[Tensor, "layer batch pos slot"],
    metric: Any,
    part: str,
    method: str,
) -> ExpertPatches:
    """The table of results; values count where there is an expert."""
    experts, _, clean_active, corrupt_active = (torch.stack(x) for x in zip(*by_layer.values(), strict=True))
    return ExpertPatches(
        list(by_layer),
        values.masked_fill(experts < 0, float("nan")),
        experts,
        clean_active,
        corrupt_active,
        total_effect(pair, metric),
        max(pair.moe(layer).num_experts for layer in by_layer),
        name_of(metric),
        part,
        method,
    )


def with_slot_per_expert(patches: ExpertPatches) -> ExpertPatches:
    """The same with a slot for every expert, in order: 0 where neither run routes the token to it."""
    index = torch.where(patches.expert_index < 0, patches.num_experts, patches.expert_index)
    shape = (*index.shape[:-1], patches.num_experts + 1)

    def by_expert(active: Bool[Tensor, "layer batch pos slot"]) -> Bool[Tensor, "layer batch pos expert"]:
        return torch.zeros(shape, dtype=torch.bool, device=index.device).scatter(-1, index, active)[..., :-1]

    experts = torch.arange(patches.num_experts, device=index.device).expand(*shape[:-1], -1)
    return ExpertPatches(
        patches.layers,
        patches.dense(),
        experts.masked_fill((patches.expert_index < 0).all(-1, keepdim=True), -1),
        by_expert(patches.clean_active),
        by_expert(patches.corrupt_active),
        patches.total,
        patches.num_experts,
        patches.metric,
        patches.part,
        patches.method,
    )
