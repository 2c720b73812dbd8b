"""What the clean run says of every active expert, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, as_expert_block
from hooked_moe.counterfactuals.engine.padding import Packed, empty_table
from hooked_moe.counterfactuals.engine.question import Question, Variants
from hooked_moe.counterfactuals.engine.requests import Layers, Mask, Tokens, make_request
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.counterfactuals.results import ExpertEffects, as_expert_effects
from hooked_moe.kernels import routing
from hooked_moe.transformer import Transformer


@pausable
def expert_observations(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None = None,
    attention_mask: Mask | None = None,
) -> Steps[ExpertEffects]:
    """The table of `expert_effects` from the clean run alone, at the cost of one forward: its effects are nan."""
    request = make_request(model, tokens, layers, None, attention_mask, (), None)
    results = yield from answer(NothingChanged(most_experts(model)), request)
    for effect in ("delta_loss", "kl"):
        results.tables[effect] = empty_table(results.tables["gap_norm"], results.tables["gap_norm"].shape)
    return as_expert_effects(results)


@dataclass(frozen=True)
class NothingChanged(Question):
    most_experts: int
    n_variants = 0

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        raise AssertionError("nothing is changed")

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        return observe(as_expert_block(clean), self.most_experts)


def most_experts(model: Transformer) -> int:
    """The number of experts of the layer that has most."""
    return max(model.cfg.experts_in(layer) for layer in model.cfg.moe_layers)


def observe(clean: CleanExperts, most_experts: int) -> dict[str, Tensor]:
    """What the clean run says of every active expert, each [batch, pos, slot], and the router of all: [batch, pos, expert]."""
    indices, weights = clean.routing
    rows, place = clean.expert_outputs
    weights, tokens = at_least_float32(weights), max(1, chunk_size_on(rows.device) // 64)  # few enough for a CPU's cache
    parts = [
        _of_contributions(weight, at_least_float32(rows[own_rows]))
        for weight, own_rows in zip(weights.flatten(0, 1).split(tokens), place.flatten(0, 1).split(tokens), strict=True)
    ]
    scores = routing.score(clean.moe.router(clean.mlp_input), clean.moe.router.rule)
    return {
        "expert_index": indices,
        "routing_weight": weights,
        "router_probability": F.pad(scores, (0, most_experts - clean.moe.num_experts)),
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
