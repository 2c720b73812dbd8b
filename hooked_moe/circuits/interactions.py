"""Exact interactions of all pairs of experts at one token: what removing both does beyond what each does alone.

found = pair_interactions(model, "the gulf of", LogitDifference(" Mexico", " France"))
found.interaction[batch, node, node]        # above 0: together worth more than alone; and later experts' self-repair
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.circuits.pairs import prompt_pair
from hooked_moe.components.moe import combine_onto
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals import At, VariantQueries, token_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.readout import Readout, by_name
from hooked_moe.counterfactuals.engine.requests import Mask, Tokens
from hooked_moe.counterfactuals.readouts import KL
from hooked_moe.counterfactuals.results import BATCH, TensorResult
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import Transformer


@dataclass(frozen=True, repr=False)
class PairInteractions(TensorResult):
    """Effects of removing every expert of a token, and every pair of them. A node is a slot of a layer."""

    nodes: list[str]
    """"L3 slot 0": the expert with the highest weight in layer 3."""
    layer: Int[Tensor, " node"]
    expert_index: Int[Tensor, "batch node"]
    single: Float[Tensor, "batch node"]
    """The readout without the expert minus that of the run."""
    joint: Float[Tensor, "batch node other"]
    """The same without both."""
    interaction: Float[Tensor, "batch node other"]
    """joint - single - single: 0 where their effects add up; nan on the diagonal."""
    metric: str

    AXES: ClassVar = {"batch": BATCH, "node": Axis("expert of the token", "name", "nodes"),
                      "other": Axis("the expert removed with it", "name", "nodes")}  # fmt: skip
    COLUMNS: ClassVar = {
        "interaction": Column("batch node other", "metric", "joint effect minus both single ones; NaN for one expert twice"),
        "joint": Column("batch node other", "metric", "effect of removing both"),
        "single": Column("batch node", "metric", "effect of removing the first"),
        "expert_index": Column("batch node", "index", "expert"),
        "layer": Column("node", "index", "transformer block"),
    }

    def attributes(self) -> dict[str, Any]:
        return {"nodes": self.nodes, "metric": self.metric}

    def plot(self, value: str | None = None, across: str | None = None, **options: Any) -> Any:
        """A heat map of node by node: the interactions' means over batch rows, or those of `value="joint"`."""
        from hooked_moe.figures import heat_map  # matplotlib takes a while to load

        value = value or "interaction"
        if value not in ("interaction", "joint") or across not in (None, "other"):
            return super().plot(value, across, **options)
        words = {"row_label": "", "column_label": "", "value_label": f"mean {value} ({self.metric})"}
        means = getattr(self, value).nanmean(0).cpu().numpy()
        return heat_map(means, **({"rows": self.nodes, "columns": self.nodes} | words | options))


@torch.no_grad()
@without_autocast()
def pair_interactions(
    model: Transformer,
    tokens: Tokens,
    metric: Readout,
    pos: int = -1,
    attention_mask: Mask | None = None,
    *,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> PairInteractions:
    """Remove every pair of the experts that a token is routed to, in the same or in two layers, and read the same token.

    All pairs of n experts are n (n - 1) / 2 removals, and each is one token through the layers. An expert that is removed in a
    later layer is removed where the earlier removal left it: if the token is not routed to it any more, there is nothing left to
    remove. So the interaction of an expert with a later one contains what the later one does to repair the loss of the first
    (McGrath et al. 2023, arXiv 2307.15771). `metric` is a readout of single tokens, read at `pos`, which is counted as in `At`.
    """
    if not isinstance(metric, Readout) or isinstance(metric, type | At):
        raise ValueError(f"metric must be a readout of the token itself, as in LogitDifference(5, 7), not {metric!r}")
    run = prompt_pair(model, tokens, tokens, attention_mask)
    packed, place = pack(run.tokens, run.attention_mask), At(pos, KL())
    by_name([place, metric], model, packed)
    at = place.original_positions(packed)
    layers = model.cfg.moe_layers
    rows = torch.arange(len(at), device=at.device)
    experts = torch.stack([run.experts("clean", layer).indices[rows, at] for layer in layers], 1).flatten(1)
    node_layer = torch.tensor(layers, dtype=torch.int64, device=at.device).repeat_interleave(model.cfg.experts_per_token)
    first, second = torch.triu_indices(len(node_layer), len(node_layer), device=at.device)

    def without(own: CleanBlock, queries: VariantQueries) -> Float[Tensor, "row query d_model"]:
        block = as_expert_block(own)
        kept = torch.ones_like(block.routing.weights)
        for nodes in (first[queries.variant], second[queries.variant]):
            removed = torch.where(node_layer[nodes] == own.layer, experts[queries.batch, nodes], -1)
            kept = kept * (block.routing.indices != removed[..., None])
        weights = (block.routing.weights * kept)[None]
        return combine_onto(block.resid_mid, block.expert_outputs, weights, block.shared_out)[0]

    if metric.width > 1:
        raise ValueError(f"{metric.name} is of later tokens, and pairs of experts are read at the token itself")
    effects = token_effects(
        model,
        run.tokens,
        dict.fromkeys(layers, without),
        len(first),
        positions=torch.zeros_like(run.tokens, dtype=torch.bool).scatter_(1, at[:, None], True),
        attention_mask=run.attention_mask,
        readouts=[metric],
        memory_budget=memory_budget,
        progress=progress,
    )
    values = effects.readouts[metric.name][0][:, rows, at].T
    joint = values.new_zeros(len(rows), len(node_layer), len(node_layer))
    joint[:, first, second] = joint[:, second, first] = values
    single = joint.diagonal(dim1=1, dim2=2).clone()
    interaction = joint - single[:, :, None] - single[:, None, :]
    interaction.diagonal(dim1=1, dim2=2).fill_(float("nan"))
    names = [f"L{layer} slot {slot}" for layer in layers for slot in range(model.cfg.experts_per_token)]
    return PairInteractions(names, node_layer, experts, single, joint, interaction, metric.name)
