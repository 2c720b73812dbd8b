"""More and more of a token's experts removed together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_moe.checks import whole_number
from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.question import Question, Variants
from hooked_moe.counterfactuals.engine.readout import Readout
from hooked_moe.counterfactuals.engine.requests import Embeddings, Layers, Mask, Positions, Tokens, make_request
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.counterfactuals.observations import most_experts, observe
from hooked_moe.counterfactuals.removals import Removal, as_removal, at_window_starts_only
from hooked_moe.counterfactuals.results import ExpertEffects, as_expert_effects
from hooked_moe.transformer import Transformer

Order = Literal["descending", "ascending", "random"]


@pausable
def progressive_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None = None,
    order: Order = "descending",
    removal: Removal | str = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    seed: int = 0,
    *,
    readouts: Iterable[Readout] = (),
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Steps[ExpertEffects]:
    """Remove more and more of the active experts at one token: `delta_loss[..., m]` is the effect of removing m + 1 of them.

    `order` is by routing weight, or random: one permutation for every layer, batch row and position, from `seed`. All else as in
    `expert_effects` at `scope="position"`; the other fields describe slot m of the clean run, whatever the order.
    """
    if order not in ("descending", "ascending", "random"):
        raise ValueError(f"order must be 'descending', 'ascending' or 'random', not {order!r}")
    request = make_request(
        model, tokens, layers, positions, attention_mask, readouts, memory_budget, embeddings=embeddings, progress=progress
    )
    removal = as_removal(removal)
    removal.check_layers(request.layers)
    question = RemovedInOrder(model.cfg.experts_per_token, removal, order, whole_number(seed, "seed"), most_experts(model))
    return as_expert_effects((yield from answer(question, request)))


@dataclass(frozen=True)
class RemovedInOrder(Question):
    """Variant m removes the first m + 1 of a token's experts."""

    n_variants: int
    removal: Removal
    order: Order
    seed: int
    most_experts: int

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        experts, slots = as_expert_block(clean), self.n_variants
        weights = experts.routing.weights[:, ::width]
        if self.order == "random":
            rank = _random_ranks(packed, clean.layer, slots, self.seed)
        else:
            rank = weights.argsort(dim=-1, descending=self.order == "descending", stable=True).argsort(-1)
        keep = rank >= torch.arange(1, slots + 1, device=weights.device).view(-1, 1, 1, 1)
        return self.removal.without(experts, at_window_starts_only(keep, experts, width))

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        return observe(as_expert_block(clean), self.most_experts)


def _random_ranks(packed: Packed, layer: int, slots: int, seed: int) -> Int[Tensor, "batch query slot"]:
    """A permutation of the slots at every measured position, the same whatever else is measured along with it."""
    rows = []
    for row, positions in zip(packed.rows.tolist(), packed.original_query_positions(), strict=True):
        generator = torch.Generator("cpu").manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + row) % (1 << 63))
        ranks = torch.rand(packed.original_length, slots, generator=generator, dtype=torch.float32, device="cpu").argsort(-1)
        rows.append(ranks.to(positions.device)[positions.clamp(min=0)])
    return torch.stack(rows)
