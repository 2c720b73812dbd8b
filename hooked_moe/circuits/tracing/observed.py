"""What a run computes at the tokens that are patched: all that patches are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.batches import Batch
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, clean_blocks
from hooked_moe.counterfactuals.engine.steps import run_without_grad
from hooked_moe.transformer import Transformer

EARLY_LAYER = 1
"""Where an attention sink shows: its residual stream is by far the longest of the row."""


@dataclass(frozen=True)
class ObservedExperts:
    """The active experts of one layer at every spot."""

    indices: Int[Tensor, "spot slot"]
    weights: Float[Tensor, "spot slot"]
    outputs: Float[Tensor, "spot slot d_model"]
    shared_out: Float[Tensor, "spot d_model"] | None
    asked: Float[Tensor, "spot slot d_model"] | None
    """What the experts of another run give on this run's input."""


@dataclass(frozen=True)
class ObservedLayer:
    attn_out: Float[Tensor, "spot d_model"]
    mlp_out: Float[Tensor, "spot d_model"]
    experts: ObservedExperts | None


@dataclass(frozen=True)
class ObservedRun:
    layers: list[ObservedLayer]
    resid: Float[Tensor, "row d_model"]
    """Each row's last residual stream at its last token, before the final norm, in at least float32."""
    sink: Bool[Tensor, " row"]
    """Whether the last token has the longest residual stream of its row after an early layer."""
    streams: list[Float[Tensor, "row pos d_model"]]
    """The residual streams before each layer, and after the last."""

    def logits(self, model: Transformer) -> Float[Tensor, "row d_vocab"]:
        return model.logits(self.resid[None])[0]


def observe(
    model: Transformer,
    embeddings: Float[Tensor, "row pos d_model"],
    batch: Batch,
    asked: Sequence[Int[Tensor, "spot slot"] | None] | None = None,
) -> ObservedRun:
    """Run prompts from their embeddings. `asked`, by layer, are experts to run on this run's input besides its own."""
    spots, final = (batch.spots.row, batch.spots.pos), batch.final
    layers: list[ObservedLayer] = []
    streams = [embeddings]
    state = {"resid_pre": embeddings[spots], "sink": torch.zeros(len(final), dtype=torch.bool, device=final.device)}

    def visit(block: CleanBlock) -> None:
        if block.layer == min(EARLY_LAYER, model.cfg.n_layers - 1):
            lengths = block.resid_post.norm(dim=-1).masked_fill(~batch.real, -1.0)
            state["sink"] = lengths.argmax(-1) == final
        here = block.at_tokens(*spots)
        experts = None
        if isinstance(here, CleanExperts):
            experts = _observed_experts(here, None if asked is None else asked[block.layer])
        resid_mid, resid_post = here.resid_mid[:, 0], here.resid_post[:, 0]
        layers.append(ObservedLayer(resid_mid - state["resid_pre"], resid_post - resid_mid, experts))
        state["resid_pre"] = resid_post
        streams.append(block.resid_post)

    last = run_without_grad(clean_blocks(model, embeddings, visit))
    resid = last[torch.arange(len(final), device=final.device), final]
    return ObservedRun(layers, at_least_float32(resid), state["sink"], streams)


def _observed_experts(here: CleanExperts, asked: Int[Tensor, "spot slot"] | None) -> ObservedExperts:
    others = None if asked is None else here.moe.run_experts(here.mlp_input, asked[:, None]).in_slots()[:, 0].clone()
    return ObservedExperts(
        indices=here.routing.indices[:, 0],
        weights=here.routing.weights[:, 0],
        outputs=here.expert_outputs.in_slots()[:, 0],
        shared_out=None if here.shared_out is None else here.shared_out[:, 0],
        asked=others,
    )
