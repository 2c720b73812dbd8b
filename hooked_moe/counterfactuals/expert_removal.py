"""What each expert does: the loss without it minus the loss with it, for every active expert at every token.

    effects = expert_effects(model, tokens)                # exact: equal to one full forward per removal
    effects.delta_loss[layer, batch, pos, slot]            # nats

Definitions follow arXiv 2606.10703: routed experts only (shared experts are never removed), the loss at position t is that of
predicting token t+1, and a position counts when t+1 exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, as_expert_block
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.picks import PickQuestion
from hooked_moe.counterfactuals.engine.question import Question, SequenceQuestion, Variants
from hooked_moe.counterfactuals.engine.readout import Readout
from hooked_moe.counterfactuals.engine.requests import Embeddings, Layers, Mask, Positions, Tokens, make_request
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.counterfactuals.observations import most_experts, observe
from hooked_moe.counterfactuals.removals import (
    Removal,
    as_removal,
    at_window_starts_only,
    each_slot_removed,
    each_slot_removed_from_here_on,
)
from hooked_moe.counterfactuals.results import ExpertEffects, as_expert_effects
from hooked_moe.transformer import Transformer

Scope = Literal["position", "sequence", "from_position"]
Picks = Bool[Tensor, "layer batch pos slot"]


@pausable
def expert_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None = None,
    scope: Scope = "position",
    removal: Removal | str = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    readouts: Iterable[Readout] = (),
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    picks: Picks | None = None,
    products: torch.dtype | str | None = None,
    progress: bool = False,
) -> Steps[ExpertEffects]:
    """Remove every active expert at every token, one at a time, and measure the loss there.

    `scope="position"` removes the expert at the measured token only; `scope="sequence"` at every token of the sequence that
    it serves; `scope="from_position"` at the measured token and all later ones, which differs from "position" only in what is
    read after the token (`readouts=[LossAfter(3)]`). `removal` is "zero", "renormalize" or "reroute", as in `ExpertMask`, or
    an object: `Mean(expert_means(model, reference))` puts the expert's mean output in its place. Shared experts stay.
    `layers` None means all that have experts; `positions` restricts what is measured, as indices valid in every row or as a
    bool mask [batch, pos]. Padding may be anywhere in `attention_mask` and enters nothing. `readouts`, such as `KL()`, are
    further columns. `embeddings` [batch, pos, d_model] are what the run begins with, in place of the tokens' own: noised ones,
    say. `picks` measures single removals only, at about the cost of one forward and of their own tokens: a bool mask
    [layer, batch, pos, slot] of the layers measured; what is not picked is nan. A pick of padding, or where there is no next
    token, is passed over. `products="bfloat16"` makes the products of a removal's way through the later layers of its change
    alone, in half precision, and adds them to the clean run's, which stays in float32: faster where a device multiplies bfloat16
    faster, and off by some 1e-5 nats in the median; "float16", which GPUs multiply as fast, is off by a tenth of that, and
    refused where a change exceeds its range; scope="sequence" has no such form.

    Exact: equals a full forward with the same `ExpertMask` (float32: within 1e-5 nats). The cost of all removals of a sequence
    is about that of `slots * (layers - 1) / 2` forwards over it and `slots * layers` unembeddings; with scope="sequence", of a
    partial forward per layer and expert in use. `memory_budget` ("4GB", or bytes) bounds the memory beside weights and results;
    `progress` shows a bar that counts layers.
    Raises `ValueError` for layers or positions out of range, for dense layers, for a budget too small for one position, and
    while hooks are attached, since hooks are written for the shapes of an ordinary forward.
    """
    if scope not in ("position", "sequence", "from_position"):
        raise ValueError(f"scope must be 'position', 'sequence' or 'from_position', not {scope!r}")
    request = make_request(
        model,
        tokens,
        layers,
        positions,
        attention_mask,
        readouts,
        memory_budget,
        embeddings=embeddings,
        progress=progress,
        products=products,
    )
    if scope == "sequence" and request.products is not None:
        raise ValueError(
            "scope='sequence' runs whole sequences again, in the model's own dtype: leave out products, or choose another scope"
        )
    if scope == "sequence" and request.readouts:
        raise ValueError("readouts are of single tokens; with scope='sequence' only the loss and the KL divergence are measured")
    removal = as_removal(removal)
    removal.check_layers(request.layers)
    slots, most = model.cfg.experts_per_token, most_experts(model)
    if picks is not None:
        if scope != "position" or positions is not None or request.readouts:
            raise ValueError(
                "picks say themselves what is measured, the loss and the KL divergence at the token: leave out scope, "
                "positions and readouts"
            )
        chosen = _checked_picks(picks, (len(request.layers), len(request.packed.rows), request.packed.original_length, slots))
        question = PickedRemovals(chosen.to(model.cfg.device), removal, most)
        return as_expert_effects((yield from answer(question, request)))
    if scope == "sequence":
        return as_expert_effects((yield from answer(RemovedFromSequences(slots, removal, most), request)))
    return as_expert_effects((yield from answer(RemovedAtTokens(slots, removal, scope, most), request)))


@dataclass(frozen=True)
class RemovedAtTokens(Question):
    """Every active expert is removed at one token, or from that token on."""

    n_variants: int
    removal: Removal
    scope: Scope
    most_experts: int

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        experts = as_expert_block(clean)
        if self.scope == "from_position" and width > 1:
            return self.removal.without(experts, each_slot_removed_from_here_on(experts, width))
        return self.removal.without(experts, at_window_starts_only(each_slot_removed(experts), experts, width))

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        return observe(as_expert_block(clean), self.most_experts)


@dataclass(frozen=True, eq=False)
class PickedRemovals(PickQuestion):
    """Single removals at one token: a way is a slot."""

    picks: Bool[Tensor, "layer batch pos slot"]
    removal: Removal
    most_experts: int

    def branch(self, clean: CleanBlock, ways: Int[Tensor, "batch query"]) -> Variants:
        experts = as_expert_block(clean)
        slots = torch.arange(self.picks.shape[-1], device=ways.device)
        return self.removal.without(experts, (slots != ways[..., None])[None])

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        return observe(as_expert_block(clean), self.most_experts)


def _checked_picks(picks: Any, expected: tuple[int, ...]) -> Bool[Tensor, "layer batch pos slot"]:
    """The mask. Raises `ValueError` for what is none of this shape."""
    if not isinstance(picks, Tensor) or picks.dtype != torch.bool or picks.shape != expected:
        got = f"{picks.dtype} {list(picks.shape)}" if isinstance(picks, Tensor) else type(picks).__name__
        raise ValueError(f"picks must be a bool mask [layer, batch, pos, slot] = {list(expected)}, not {got}")
    return picks


@dataclass(frozen=True)
class RemovedFromSequences(SequenceQuestion):
    """Each expert is removed from every token of the sequence that it serves."""

    n_variants: int
    removal: Removal
    most_experts: int

    def without_experts(self, clean: CleanExperts, experts: Int[Tensor, " row"]) -> Float[Tensor, "row pos d_model"]:
        keep = clean.routing.indices != experts[:, None, None]
        return self.removal.without(clean, keep[None])[0]

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        return observe(as_expert_block(clean), self.most_experts)
