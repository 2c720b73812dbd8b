"""What each expert does: the loss without it minus the loss with it, for every active expert at every token.

    effects = expert_effects(model, tokens)                # exact: equal to one full forward per removal
    effects.delta_loss[layer, batch, pos, slot]            # nats

Definitions follow arXiv 2606.10703: routed experts only (shared experts are never removed), the loss at position t is that of
predicting token t+1, and a position counts when t+1 exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.components.moe import plus
from hooked_moe.components.norm import at_least_float32
from hooked_moe.effects import ExpertEffects, concatenate
from hooked_moe.expert_mask import LayerMask, Removal, check_removal, keep_weights
from hooked_moe.fan_out import TOKENS_AT_ONCE, CleanExperts, clean_run, fan_out, loss_at, take
from hooked_moe.kernels.weighted_sum import masked_combine
from hooked_moe.model import HookedMoE
from hooked_moe.padding import Packed, pack

Scope = Literal["position", "sequence"]
Order = Literal["descending", "ascending", "random"]
Keep = Bool[Tensor, "variant #batch #pos slot"]

MEMORY_BYTES = 1 << 30
"""About how much the variants in flight may take; larger batches go in parts."""


def expert_effects(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
    scope: Scope = "position",
    removal: Removal = "zero",
    positions: Sequence[int] | Bool[Tensor, "batch pos"] | None = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
) -> ExpertEffects:
    """Remove every active expert at every token, one at a time, and measure the loss there.

    `scope="position"` removes the expert at the measured token only; `scope="sequence"` at every token of the sequence that
    it serves. `removal` is as in `ExpertMask`; shared experts stay. `layers` None means all that have experts; `positions`
    restricts what is measured, as indices valid in every row or as a bool mask [batch, pos]. Padding may be anywhere in
    `attention_mask` and enters nothing.

    Exact: equals a full forward with the same `ExpertMask` (float32: within 1e-5 nats). The cost of all removals of a sequence
    is about that of `slots * (layers - 1) / 2` forwards over it and `slots * layers` unembeddings; with scope="sequence", of a
    partial forward per layer and expert in use. Raises `ValueError` for layers or positions out of range, for dense layers, and
    while hooks are attached, since hooks are written for the shapes of an ordinary forward.
    """
    check_removal(removal)
    if scope not in ("position", "sequence"):
        raise ValueError(f"scope must be 'position' or 'sequence', not {scope!r}")

    def measure(packed: Packed, chosen: list[int]) -> ExpertEffects:
        if scope == "sequence":
            return _sequence_scope(model, packed, chosen, removal)
        return _position_scope(model, packed, chosen, removal, each_slot_removed)

    return _measure(model, tokens, layers, positions, attention_mask, measure)


def progressive_effects(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
    order: Order = "descending",
    removal: Removal = "zero",
    positions: Sequence[int] | Bool[Tensor, "batch pos"] | None = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    seed: int = 0,
) -> ExpertEffects:
    """Remove more and more of the active experts at one token: `delta_loss[..., m]` is the effect of removing m + 1 of them.

    `order` is by routing weight, or random: one permutation for every layer, batch row and position, from `seed`. All else as in
    `expert_effects` at `scope="position"`; the other fields describe slot m of the clean run, whatever the order.
    """
    check_removal(removal)
    if order not in ("descending", "ascending", "random"):
        raise ValueError(f"order must be 'descending', 'ascending' or 'random', not {order!r}")

    def measure(packed: Packed, chosen: list[int]) -> ExpertEffects:
        def keep(clean: CleanExperts) -> Keep:
            weights = clean.routing.weights
            if order == "random":
                rank = _random_ranks(packed, clean.layer, weights.shape[-1], seed)
            else:
                rank = weights.argsort(dim=-1, descending=order == "descending", stable=True).argsort(-1)
            return rank >= torch.arange(1, weights.shape[-1] + 1, device=weights.device).view(-1, 1, 1, 1)

        return _position_scope(model, packed, chosen, removal, keep)

    return _measure(model, tokens, layers, positions, attention_mask, measure)


def _random_ranks(packed: Packed, layer: int, slots: int, seed: int) -> Int[Tensor, "batch query slot"]:
    """A permutation of the slots at every measured position, the same whatever else is measured along with it."""
    rows = []
    for row, source in zip(packed.rows.tolist(), packed.source, strict=True):
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + row) % (1 << 63))
        ranks = torch.rand(packed.width, slots, generator=generator).argsort(-1).to(source.device)
        rows.append(ranks[source.clamp(min=0)])
    return take(torch.stack(rows), packed.positions)


def expert_observations(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
) -> ExpertEffects:
    """The same table from the clean run alone: what routing says, at the cost of one forward; `delta_loss` is nan."""

    def measure(packed: Packed, chosen: list[int]) -> ExpertEffects:
        clean_blocks, baseline = _clean_blocks(model, packed, chosen)
        observations = [observe(clean) for clean in clean_blocks]
        nothing = [torch.full_like(o["gap_norm"], float("nan")) for o in observations]
        return _table(chosen, torch.stack(nothing), baseline, observations)

    return _measure(model, tokens, layers, None, attention_mask, measure)


def _measure(
    model: HookedMoE,
    tokens: Tensor,
    layers: Sequence[int] | None,
    positions: Sequence[int] | Tensor | None,
    attention_mask: Tensor | None,
    measure: Callable[[Packed, list[int]], ExpertEffects],
) -> ExpertEffects:
    """Check the request, pack away the padding, and measure as many batch rows and layers at a time as memory allows."""
    tokens, attention_mask = model.as_tokens(tokens, attention_mask)
    hooked = [name for name, point in model.hook_dict.items() if point.active]
    if hooked:
        raise ValueError(
            f"counterfactuals measure the unhooked model, and {hooked[0]} has hooks: call model.reset_hooks() first "
            "(including_permanent=True for permanent hooks)"
        )
    if isinstance(layers, int):
        raise ValueError(f"layers must be a list of layers, as in [{layers}], not the number {layers}")
    chosen = model.cfg.moe_layers if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < model.cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {model.cfg.n_layers - 1}")
        if not model.cfg.experts_in(layer):
            raise ValueError(f"layer {layer} is dense: it has no experts; layers {model.cfg.moe_layers} have")
    if not chosen:
        raise ValueError("no layers to measure: layers is empty")
    packed = pack(tokens, attention_mask, positions)
    variant_bytes = packed.queries * model.cfg.d_model * model.cfg.dtype.itemsize
    at_once = max(1, MEMORY_BYTES // (model.cfg.experts_per_token * variant_bytes))  # (row, layer) pairs
    layers_at_once = min(at_once, len(chosen))
    groups = [chosen[i : i + layers_at_once] for i in range(0, len(chosen), layers_at_once)]
    parts = []
    with torch.inference_mode():
        for rows in packed.split(at_once // layers_at_once):
            parts.append(concatenate([measure(rows, group) for group in groups], "layer"))
    return packed.unpack(concatenate(parts, "batch"))


def _position_scope(
    model: HookedMoE, packed: Packed, layers: list[int], removal: Removal, keep: Callable[[CleanExperts], Keep]
) -> ExpertEffects:
    observations = []

    def branch(clean: CleanExperts) -> Float[Tensor, "variant batch query d_model"]:
        observations.append(observe(clean))
        here = clean.at(packed.positions)
        return without(here, keep(here), removal)

    variants = model.cfg.experts_per_token
    losses, baseline = fan_out(model, packed.tokens, packed.targets, layers, variants, branch, packed.positions)
    delta = (losses - take(baseline, packed.positions)).permute(0, 2, 3, 1)
    return _table(layers, packed.spread(delta), baseline, observations)


def _sequence_scope(model: HookedMoE, packed: Packed, layers: list[int], removal: Removal) -> ExpertEffects:
    """One partial forward per (sequence, expert that it uses)."""
    clean_blocks, baseline = _clean_blocks(model, packed, layers)
    deltas = [_sequence_losses(model, packed, clean, removal) - baseline.unsqueeze(-1) for clean in clean_blocks]
    asked = packed.spread(torch.stack([take(delta, packed.positions) for delta in deltas]))
    return _table(layers, asked, baseline, [observe(clean) for clean in clean_blocks])


def _clean_blocks(model: HookedMoE, packed: Packed, layers: list[int]) -> tuple[list[CleanExperts], Float[Tensor, "batch pos"]]:
    """The blocks of some layers, and the loss at every position."""
    kept = []
    for clean in clean_run(model, packed.tokens):
        if clean.layer in layers:
            assert isinstance(clean, CleanExperts), f"layer {clean.layer} has no experts"
            kept.append(clean)
    return kept, loss_at(model, clean.resid_post[None], packed.targets)[0]


def _sequence_losses(model: HookedMoE, packed: Packed, clean: CleanExperts, removal: Removal) -> Float[Tensor, "batch pos slot"]:
    """The loss at every position without the expert of each of its slots, removed from the whole sequence."""
    indices = clean.routing.indices
    batch, length, _ = indices.shape
    without_expert = torch.full((batch, clean.moe.num_experts, length), float("nan"), device=indices.device)
    used = torch.zeros(batch, clean.moe.num_experts, dtype=torch.bool, device=indices.device)
    used.scatter_(1, indices.flatten(1), True)
    for pairs in used.nonzero().split(max(1, TOKENS_AT_ONCE // length)):
        row, expert = pairs.unbind(-1)
        keep = indices[row] != expert[:, None, None]
        resid = without(clean.rows(row), keep[None], removal)[0]
        resid = model(resid, start_at_layer=clean.layer + 1, stop_at_layer=model.cfg.n_layers)
        without_expert[row, expert] = loss_at(model, resid[None], packed.targets[row])[0].to(without_expert.dtype)
    return without_expert.transpose(1, 2).gather(-1, indices)


def each_slot_removed(clean: CleanExperts) -> Keep:
    """Variant j removes the expert of slot j."""
    slots = clean.routing.weights.shape[-1]
    return ~torch.eye(slots, dtype=torch.bool, device=clean.routing.weights.device)[:, None, None, :]


def without(clean: CleanExperts, keep: Keep, removal: Removal) -> Float[Tensor, "variant batch pos d_model"]:
    """The residual stream after the block when only the slots in `keep` contribute."""
    indices, weights = clean.routing
    if removal != "reroute":
        routed = masked_combine(*clean.expert_outputs, keep_weights(weights, keep, removal))
        return clean.resid_mid + plus(routed, clean.shared_out)
    variants = []
    for kept in keep.expand(-1, *indices.shape):
        experts = torch.ones(*indices.shape[:2], clean.moe.num_experts, dtype=torch.bool, device=indices.device)
        mask = LayerMask(experts.scatter(-1, indices, kept), removal)
        variants.append(clean.resid_mid + clean.moe(clean.mlp_input, mask))
    return torch.stack(variants)


def observe(clean: CleanExperts) -> dict[str, Tensor]:
    """What the clean run says of every active expert: each [batch, pos, slot]."""
    indices, weights = clean.routing
    weights, outputs = at_least_float32(weights), at_least_float32(clean.expert_outputs.in_slots())
    contributions = weights.unsqueeze(-1) * outputs
    rest = contributions.sum(-2, keepdim=True) - contributions
    output_norm = outputs.norm(dim=-1)
    return {
        "expert_index": indices,
        "routing_weight": weights,
        "output_norm": output_norm,
        "gap_norm": weights.abs() * output_norm,
        "rest_cosine": torch.cosine_similarity(contributions, rest, dim=-1),
    }


def _table(layers: list[int], delta: Tensor, baseline: Tensor, observations: list[dict[str, Tensor]]) -> ExpertEffects:
    stacked = {name: torch.stack([layer[name] for layer in observations]) for name in observations[0]}
    return ExpertEffects(layers=layers, delta_loss=delta, baseline_loss=baseline, **stacked)
