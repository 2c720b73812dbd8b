"""Activation patching with an expert axis: every expert of every token in every layer, one at a time, in one call.

_, clean_cache = model.run_with_cache(clean_tokens)
patches = get_act_patch_expert(model, corrupted_tokens, clean_cache, At(-1, LogitDifference(answer, foil)))
patches.values[layer, batch, pos, slot]; patches.plot()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.circuits.metrics import Metric, check_metric, effects_of_deltas, is_readout, name_of, total_effect
from hooked_moe.circuits.pairs import (
    ActiveExperts,
    Clean,
    ExpertDeltas,
    LayerExperts,
    Part,
    PromptPair,
    check_part,
    clean_side,
    deltas_between,
    expert_deltas,
    prompt_pair,
)
from hooked_moe.circuits.results import ExpertPatches
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.padding import Packed, pack
from hooked_moe.counterfactuals.engine.question import Question, Variants
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens, checked_layers, make_request
from hooked_moe.counterfactuals.engine.steps import run_without_grad
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
    progress: bool = False,
) -> ExpertPatches:
    """Put each expert's part of the clean run into the corrupted run, one expert of one token at a time, and measure the metric.

    What is patched is the expert's contribution w E (weight times output; 0 where a run does not route the token to it), with
    part="content" what it writes at the clean run's weight, with "routing" its weight. The token is not routed again in that
    layer, and is in later ones. `clean_cache` may also be the clean tokens or text, of the same lengths. `layers` None means all
    with experts; `positions` are indices valid in every row, or a bool mask [batch, pos]. `dense` has a slot for every expert.

    `metric` is a readout, such as `At(-1, LogitDifference(answer, foil))`, which is exact and takes the changed tokens alone
    through the later layers; or a function of the logits [batch, pos, d_vocab] that returns one number for each row, for which
    all tokens are run from the patched layer on. A readout without `At` is read at the patched token itself. `progress` shows
    a bar.

    The expert-axis form of TransformerLens's `get_act_patch_mlp_out`. Raises `ValueError` for runs of different lengths, for
    layers or positions out of range, for dense layers, and while hooks are attached.
    """
    check_part(part)
    chosen = checked_layers(model, layers)
    pair = clean_side(model, clean_cache, corrupted_tokens, attention_mask)
    check_metric(metric, pair)
    asked = asked_positions(pair, positions)
    if is_readout(metric):
        question = PatchedExperts(2 * model.cfg.experts_per_token, pair, part)
        request = make_request(model, pair.tokens, chosen, asked, pair.attention_mask, [metric], memory_budget, progress=progress)
        values = run_without_grad(answer(question, request)).tables[f"readouts/{metric.name}"]
        if values.dim() != 4:
            raise ValueError(f"the metric must be one number; {metric!r} has {list(values.shape[4:])}")
        pair, active = question.corrupt_pair(), {layer: question.found[layer] for layer in chosen}
    else:
        pair = prompt_pair(model, pair.clean, pair.tokens, pair.attention_mask)
        by_layer = aligned({layer: expert_deltas(pair, layer, part).where(asked) for layer in chosen})
        active = {layer: deltas.active() for layer, deltas in by_layer.items()}
        values = effects_of_deltas(
            pair, {layer: deltas.delta for layer, deltas in by_layer.items()}, metric, asked, progress=progress
        )
    patches = as_patches(pair, active, values, metric, part, "exact")
    return with_slot_per_expert(patches) if dense else patches


@dataclass(frozen=True, eq=False)
class PatchedExperts(Question):
    """Each variant puts one expert's part of the clean run into the corrupted one: what the engine calls its clean run."""

    n_variants: int
    pair: PromptPair
    part: Part
    found: dict[int, ActiveExperts] = field(default_factory=dict)
    """By layer, at the positions asked for."""
    end: dict[str, Tensor] = field(default_factory=dict)
    """The corrupted run's last residual stream, by its name in a cache."""

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        here = as_expert_block(clean.at_window_starts(width))
        at = packed.rows[:, None], packed.original_query_positions().clamp(min=0)
        own = LayerExperts(*here.routing, here.expert_outputs.in_slots())
        clean_run = LayerExperts(*(x[at] for x in self.pair.experts("clean", clean.layer)))
        deltas = deltas_between(clean_run, own, self.part, here.moe, here.mlp_input)
        deltas = deltas.in_slots(self.n_variants).where(packed.asked_positions() >= 0)
        self._keep(clean.layer, deltas.active(), packed)
        variants = clean.resid_post.expand(self.n_variants, -1, -1, -1).clone()
        variants[:, :, ::width] += deltas.delta.movedim(2, 0)
        return variants

    def see_end(self, resid: Float[Tensor, "batch packed d_model"], packed: Packed) -> None:
        name = f"blocks.{self.pair.model.cfg.n_layers - 1}.hook_resid_post"
        whole = self.end.setdefault(name, resid.new_zeros(*self.pair.tokens.shape, resid.shape[-1]))
        row, position = packed.real
        whole[packed.rows[row], packed.original_positions[row, position]] = resid[row, position]

    def corrupt_pair(self) -> PromptPair:
        """The pair with what was seen of the corrupted run."""
        return replace(self.pair, corrupt=self.end)

    def _keep(self, layer: int, active: ActiveExperts, packed: Packed) -> None:
        if layer not in self.found:
            shape = (*self.pair.tokens.shape, self.n_variants)
            self.found[layer] = ActiveExperts(active.experts.new_full(shape, -1), *(x.new_zeros(shape) for x in active[1:]))
        row, query = packed.measured
        place = packed.rows[row], packed.asked_positions()[row, query]
        for whole, part in zip(self.found[layer], active, strict=True):
            whole[place] = part[row, query]


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
    return {layer: deltas.in_slots(slots) for layer, deltas in by_layer.items()}


def as_patches(
    pair: PromptPair,
    by_layer: dict[int, ActiveExperts],
    values: Float[Tensor, "layer batch pos slot"],
    metric: Any,
    part: str,
    method: str,
) -> ExpertPatches:
    """The table of results, in as many slots as are in use. Values are exactly 0 where nothing changed."""
    experts, changed, clean_active, corrupt_active = (torch.stack(x) for x in zip(*by_layer.values(), strict=True))
    used = max(1, int((experts >= 0).sum(-1).max()))
    values = values.where(changed, 0.0).masked_fill(experts < 0, float("nan"))
    return ExpertPatches(
        list(by_layer),
        values[..., :used],
        experts[..., :used],
        clean_active[..., :used],
        corrupt_active[..., :used],
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
