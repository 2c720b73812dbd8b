"""What each expert does: the loss without it minus the loss with it, for every active expert at every token.

    effects = expert_effects(model, tokens)                # exact: equal to one full forward per removal
    effects.delta_loss[layer, batch, pos, slot]            # nats

Definitions follow arXiv 2606.10703: routed experts only (shared experts are never removed), the loss at position t is that of
predicting token t+1, and a position counts when t+1 exists.

Sets of experts and float masks are `mask_effects`; any other change of the residual stream at single tokens is `token_effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.fan_out import CleanBlock, CleanExperts, Steps, clean_blocks, loss_at, tokens_at_once
from hooked_moe.counterfactuals.engine.padding import Packed, Results, empty_table
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Request, Tokens, Work, complete, make_request
from hooked_moe.counterfactuals.engine.sequence_scope import measure_sequences
from hooked_moe.counterfactuals.readouts import NamedReadout
from hooked_moe.counterfactuals.removals import (
    AnyRemoval,
    ExpertMeans,
    check_any_removal,
    each_slot_removed,
    each_slot_removed_in_windows,
    in_windows,
    rerouted,
    with_experts,
    without,
)
from hooked_moe.counterfactuals.results import PER_SLOT, ExpertEffects, VariantEffects
from hooked_moe.expert_mask import check_mask
from hooked_moe.transformer import Transformer

Scope = Literal["position", "sequence", "from_position"]
Order = Literal["descending", "ascending", "random"]
Variants = Float[Tensor, "variant batch token d_model"]
"""Residual streams after a block, at every token of the windows."""


def expert_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    scope: Scope = "position",
    removal: AnyRemoval = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    means: ExpertMeans | None = None,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> ExpertEffects:
    """Remove every active expert at every token, one at a time, and measure the loss there.

    `scope="position"` removes the expert at the measured token only; `scope="sequence"` at every token of the sequence that
    it serves; `scope="from_position"` at the measured token and all later ones, which differs from "position" only in what is
    read after the token (`readouts=[LossAfter(3)]`). `removal` is as in `ExpertMask`, or "mean": the expert's output is replaced
    by its mean over a reference, `means=expert_means(model, reference)`. Shared experts stay. `layers` None means all that have
    experts; `positions` restricts what is measured, as indices valid in every row or as a bool mask [batch, pos]. Padding may
    be anywhere in `attention_mask` and enters nothing. `readouts`, such as `KL()`, are further columns.

    Exact: equals a full forward with the same `ExpertMask` (float32: within 1e-5 nats). The cost of all removals of a sequence
    is about that of `slots * (layers - 1) / 2` forwards over it and `slots * layers` unembeddings; with scope="sequence", of a
    partial forward per layer and expert in use. `memory_budget` ("4GB", or bytes) bounds the memory beside weights and results.
    Raises `ValueError` for layers or positions out of range, for dense layers, for a budget too small for one position, and
    while hooks are attached, since hooks are written for the shapes of an ordinary forward.
    """
    return complete(
        expert_effects_steps(
            model,
            tokens,
            layers,
            scope,
            removal,
            positions,
            attention_mask,
            means=means,
            readouts=readouts,
            memory_budget=memory_budget,
        )
    )


def expert_effects_steps(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None,
    scope: Scope,
    removal: AnyRemoval,
    positions: Positions | None,
    attention_mask: Mask | None = None,
    *,
    means: ExpertMeans | None = None,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> Steps[ExpertEffects]:
    """`expert_effects` that pauses after every layer, so that several texts can go through the layers side by side."""
    if scope not in ("position", "sequence", "from_position"):
        raise ValueError(f"scope must be 'position', 'sequence' or 'from_position', not {scope!r}")
    if scope == "sequence" and readouts:
        raise ValueError("readouts are of single tokens; with scope='sequence' only the loss is measured")
    request = make_request(model, tokens, layers, positions, attention_mask, readouts, memory_budget)
    check_any_removal(removal, means, request.layers)

    def variants(clean: CleanExperts, packed: Packed) -> Variants:
        if scope == "from_position" and request.width > 1:
            return without(clean, each_slot_removed_in_windows(clean, request.width), removal, means)
        return without(clean, in_windows(each_slot_removed(clean), clean, request.width), removal, means)

    if scope == "sequence":
        work = _sequence_scope(request, removal, means)
    else:
        work = _position_scope(request, variants, model.cfg.experts_per_token, observed=True)
    return _as_expert_effects((yield from request.run(work, model.cfg.experts_per_token)))


def progressive_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    order: Order = "descending",
    removal: AnyRemoval = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    seed: int = 0,
    *,
    means: ExpertMeans | None = None,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> ExpertEffects:
    """Remove more and more of the active experts at one token: `delta_loss[..., m]` is the effect of removing m + 1 of them.

    `order` is by routing weight, or random: one permutation for every layer, batch row and position, from `seed`. All else as in
    `expert_effects` at `scope="position"`; the other fields describe slot m of the clean run, whatever the order.
    """
    return complete(
        progressive_effects_steps(
            model,
            tokens,
            layers,
            order,
            removal,
            positions,
            attention_mask,
            seed,
            means=means,
            readouts=readouts,
            memory_budget=memory_budget,
        )
    )


def progressive_effects_steps(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None,
    order: Order,
    removal: AnyRemoval,
    positions: Positions | None,
    attention_mask: Mask | None = None,
    seed: int = 0,
    *,
    means: ExpertMeans | None = None,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> Steps[ExpertEffects]:
    """`progressive_effects` that pauses after every layer."""
    if order not in ("descending", "ascending", "random"):
        raise ValueError(f"order must be 'descending', 'ascending' or 'random', not {order!r}")
    request = make_request(model, tokens, layers, positions, attention_mask, readouts, memory_budget)
    check_any_removal(removal, means, request.layers)

    slots = model.cfg.experts_per_token

    def variants(clean: CleanExperts, packed: Packed) -> Variants:
        weights = clean.routing.weights[:, :: request.width]
        if order == "random":
            rank = _random_ranks(packed, clean.layer, slots, seed)
        else:
            rank = weights.argsort(dim=-1, descending=order == "descending", stable=True).argsort(-1)
        keep = rank >= torch.arange(1, slots + 1, device=weights.device).view(-1, 1, 1, 1)
        return without(clean, in_windows(keep, clean, request.width), removal, means)

    return _as_expert_effects((yield from request.run(_position_scope(request, variants, slots, observed=True), slots)))


def _random_ranks(packed: Packed, layer: int, slots: int, seed: int) -> Int[Tensor, "batch query slot"]:
    """A permutation of the slots at every measured position, the same whatever else is measured along with it."""
    rows = []
    for row, places in zip(packed.rows.tolist(), packed.places(), strict=True):
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + row) % (1 << 63))
        ranks = torch.rand(packed.width, slots, generator=generator).argsort(-1).to(places.device)
        rows.append(ranks[places.clamp(min=0)])
    return torch.stack(rows)


def mask_effects(
    model: Transformer,
    tokens: Tokens,
    masks: Mapping[int, Tensor],
    removal: AnyRemoval = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    means: ExpertMeans | None = None,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> VariantEffects:
    """Remove sets of experts (coalitions), or scale them, at one token at a time, and measure the loss there.

    `masks` maps a layer to a bool or float tensor that broadcasts to [variant, batch, pos, expert], with as many variants in
    every layer: True (1.0) keeps an expert's contribution at that token. All else as in `expert_effects` at `scope="position"`;
    "reroute" takes bool masks. Raises `ValueError` for masks that do not fit.
    """
    request = make_request(model, tokens, list(masks), positions, attention_mask, readouts, memory_budget)
    check_any_removal(removal, means, request.layers)
    masks = {int(layer): mask for layer, mask in masks.items()}
    shape = (len(request.packed.rows), request.packed.width)
    full = {layer: _full_mask(model, layer, masks[layer], shape, removal) for layer in request.layers}
    counts = sorted({len(mask) for mask in full.values()})
    if len(counts) > 1:
        raise ValueError(f"every layer must have as many masks as the others; got {counts}")
    check_n_variants(counts[0])

    def variants(clean: CleanExperts, packed: Packed) -> Variants:
        keep = full[clean.layer][:, packed.rows[:, None], packed.places().clamp(min=0)]
        if removal == "reroute":
            return rerouted(clean, in_windows(keep, clean, request.width))
        indices = clean.routing.indices[:, :: request.width]
        by_slot = keep.gather(-1, indices.expand(len(keep), *indices.shape))
        return without(clean, in_windows(by_slot, clean, request.width), removal, means)

    work = _position_scope(request, variants, counts[0], observed=False)
    return _as_variant_effects(complete(request.run(work, counts[0])))


def _full_mask(
    model: Transformer, layer: int, mask: Tensor, shape: tuple[int, int], removal: AnyRemoval
) -> Shaped[Tensor, "variant batch pos expert"]:
    check_mask(layer, mask, removal)
    expected = (mask.shape[0] if mask.dim() == 4 else 1, *shape, model.cfg.experts_in(layer))
    try:
        return mask.to(model.cfg.device).expand(expected)
    except RuntimeError as error:
        raise ValueError(
            f"the masks of layer {layer} have shape {list(mask.shape)}; they must broadcast to "
            f"[variant, batch, pos, expert] = [any, {', '.join(map(str, expected[1:]))}]"
        ) from error


def check_n_variants(n_variants: Any) -> None:
    """Raise `ValueError` unless it is a number of variants to measure."""
    if (as_int_or_none(n_variants) or 0) < 1:
        raise ValueError(f"the number of variants must be a whole number from 1, not {n_variants!r}")


class Where(NamedTuple):
    """Which token each query is: batch row and position in the tokens given; -1 where a row has fewer queries than others."""

    batch: Int[Tensor, "batch query"]
    pos: Int[Tensor, "batch query"]


Edit = Callable[[CleanBlock, Where], Float[Tensor, "variant batch query d_model"]]


def token_effects(
    model: Transformer,
    tokens: Tokens,
    edit: Edit,
    n_variants: int = 1,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    readouts: Sequence[NamedReadout] = (),
    memory_budget: int | str | None = None,
) -> VariantEffects:
    """Change the residual stream after a block at one token at a time, in any way, and measure the loss there.

    `edit(clean, where)` is called for each layer of `layers` (default: all, dense ones too) and returns `n_variants` residual
    streams after that block, [variant, batch, query, d_model], for all queried positions at once. `clean` holds what the clean
    run computed there: `clean.resid_mid`, `.mlp_input`, `.resid_post` [batch, query, d_model], and in layers with experts
    `.routing`, `.expert_outputs`, `.shared_out` and the module `.moe`. In each variant that one token alone is changed. All of
    these may be written to in place, the model's parameters not: the clean run goes on from memory of its own.

        def steer(clean, where):
            return clean.resid_post + strengths[:, None, None, None] * direction     # one variant per strength

    Exact, as `expert_effects` is, and as fast. `where.pos` is the position in `tokens`, so that padded rows need no care.
    """
    check_n_variants(n_variants)
    request = make_request(model, tokens, layers, positions, attention_mask, readouts, memory_budget, dense=True)

    def work(packed: Packed, some: list[int], results: Results) -> Steps[None]:
        places = packed.where()

        def branch(clean: CleanBlock) -> Variants:
            # Of what an edit is given, the clean run and the results still need these; the rest it may write to as it is.
            given = replace(clean.first_of(request.width), resid_post=clean.resid_post[:, :: request.width].clone())
            edited = edit(given, Where(packed.rows[:, None].expand_as(places).clone(), places.clone()))
            check_edited(edited, (n_variants, *places.shape, model.cfg.d_model))
            windows = clean.resid_post.expand(n_variants, -1, -1, -1).clone()
            windows[:, :, :: request.width] = edited
            return windows

        return request.fan_out(packed, some, results, n_variants, branch)

    return _as_variant_effects(complete(request.run(work, n_variants)))


def check_edited(edited: Any, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` unless an edit returned residual streams of the expected shape."""
    if not isinstance(edited, Tensor) or not edited.is_floating_point():
        got = edited.dtype if isinstance(edited, Tensor) else type(edited).__name__
    elif edited.shape != expected:
        got = f"shape {list(edited.shape)}"
    else:
        return
    raise ValueError(f"edit returned {got}; expected a float tensor [variant, batch, query, d_model] = {list(expected)}")


def expert_observations(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    attention_mask: Mask | None = None,
) -> ExpertEffects:
    """The same table from the clean run alone: what routing says, at the cost of one forward; `delta_loss` is nan."""
    return complete(expert_observations_steps(model, tokens, layers, attention_mask))


def expert_observations_steps(
    model: Transformer, tokens: Tokens, layers: Sequence[int] | None, attention_mask: Mask | None = None
) -> Steps[ExpertEffects]:
    """`expert_observations` that pauses after every layer."""
    request = make_request(model, tokens, layers, None, attention_mask, (), None)

    def work(packed: Packed, some: list[int], results: Results) -> Steps[None]:
        resid = yield from clean_blocks(model, packed.tokens, _observer(model, packed, some, results))
        results.put_baseline(loss_at(model, resid[None], packed.targets)[0], packed)

    results = yield from request.run(work, model.cfg.experts_per_token)
    results.tables["delta_loss"] = empty_table(results.tables["gap_norm"], results.tables["gap_norm"].shape)
    return _as_expert_effects(results)


def _position_scope(
    request: Request, variants: Callable[[CleanExperts, Packed], Variants], n_variants: int, observed: bool
) -> Work:
    """The variants that the given function makes of a layer with experts, each changed at one token."""

    def work(packed: Packed, some: list[int], results: Results) -> Steps[None]:
        def branch(clean: CleanBlock) -> Variants:
            return variants(with_experts(clean), packed)

        visit = _observer(request.model, packed, some, results) if observed else None
        return request.fan_out(packed, some, results, n_variants, branch, visit)

    return work


def _sequence_scope(request: Request, removal: AnyRemoval, means: ExpertMeans | None) -> Work:
    """Each expert removed from every token of the sequence that it serves."""

    def work(packed: Packed, some: list[int], results: Results) -> Steps[None]:
        observe_into = _observer(request.model, packed, some, results)
        return measure_sequences(request, packed, some, results, removal, means, observe_into)

    return work


def _observer(model: Transformer, packed: Packed, layers: list[int], results: Results) -> Callable[[CleanBlock], None]:
    """Puts what the clean run says of every active expert into the results, layer by layer."""
    most_experts = max(model.cfg.experts_in(layer) for layer in model.cfg.moe_layers)

    def visit(clean: CleanBlock) -> None:
        if clean.layer in layers:
            for name, values in observe(with_experts(clean), most_experts).items():
                results.put(name, values[None], packed, [clean.layer], everywhere=True)

    return visit


def observe(clean: CleanExperts, most_experts: int) -> dict[str, Tensor]:
    """What the clean run says of every active expert, each [batch, pos, slot], and the router of all: [batch, pos, expert]."""
    indices, weights = clean.routing
    rows, place = clean.expert_outputs
    weights, tokens = at_least_float32(weights), max(1, tokens_at_once(rows.device) // 64)  # few enough for a CPU's cache
    parts = [
        _of_contributions(weight, at_least_float32(rows[its_rows]))
        for weight, its_rows in zip(weights.flatten(0, 1).split(tokens), place.flatten(0, 1).split(tokens), strict=True)
    ]
    probabilities = clean.moe.router(clean.mlp_input).softmax(dim=-1)
    return {
        "expert_index": indices,
        "routing_weight": weights,
        "router_probability": F.pad(probabilities, (0, most_experts - clean.moe.num_experts)),
    } | {name: torch.cat([part[name] for part in parts]).view(indices.shape) for name in parts[0]}


def _of_contributions(
    weights: Float[Tensor, "token slot"], outputs: Float[Tensor, "token slot d_model"]
) -> dict[str, Float[Tensor, "token slot"]]:
    """What the outputs of a token's active experts say of each of them."""
    contributions = weights.unsqueeze(-1) * outputs
    rest = contributions.sum(-2, keepdim=True) - contributions
    output_norm = outputs.norm(dim=-1)
    return {
        "output_norm": output_norm,
        "gap_norm": weights.abs() * output_norm,
        "rest_cosine": torch.cosine_similarity(contributions, rest, dim=-1),
        "rest_norm": rest.norm(dim=-1),
        "max_activation": outputs.abs().amax(dim=-1),
    }


def _readouts(results: Results) -> dict[str, Tensor]:
    prefix = "readouts/"
    return {name.removeprefix(prefix): table for name, table in results.tables.items() if name.startswith(prefix)}


def _as_expert_effects(results: Results) -> ExpertEffects:
    columns = {name: results.tables[name] for name in (*PER_SLOT, "router_probability")}
    return ExpertEffects(layers=results.layers, baseline_loss=results.baseline, readouts=_readouts(results), **columns)


def _as_variant_effects(results: Results) -> VariantEffects:
    def variants_second(table: Tensor) -> Tensor:
        return table.movedim(3, 1)

    return VariantEffects(
        layers=results.layers,
        delta_loss=variants_second(results.tables["delta_loss"]),
        baseline_loss=results.baseline,
        readouts={name: variants_second(table) for name, table in _readouts(results).items()},
    )
