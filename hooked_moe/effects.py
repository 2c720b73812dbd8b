"""The table of what removals did: one value per (layer, batch, pos, slot)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ExpertEffects:
    """Observations of the clean run and the effect of each removal, for every active expert.

    Slot j of a position is its j-th expert by routing weight. Values are nan (`expert_index` -1) where there is no token, and
    `delta_loss` also where the position was not asked for or has no next token.
    """

    layers: list[int]
    """The model's layer of each entry of the `layer` axis."""
    delta_loss: Float[Tensor, "layer batch pos slot"]
    """Loss at the position with the removal minus without, in nats (delta_i(t), arXiv 2606.10703)."""
    expert_index: Int[Tensor, "layer batch pos slot"]
    routing_weight: Float[Tensor, "layer batch pos slot"]
    """g_i: the weight as applied, after renormalisation and scaling."""
    gap_norm: Float[Tensor, "layer batch pos slot"]
    """g_i ||E_i(x)||: how far the removal moves the block's output."""
    output_norm: Float[Tensor, "layer batch pos slot"]
    """||E_i(x)||."""
    rest_cosine: Float[Tensor, "layer batch pos slot"]
    """Cosine between the expert's contribution and the rest of the routed sum; 0 where either is zero."""
    baseline_loss: Float[Tensor, "batch pos"]
    """-log p(next token) of the clean run, in nats; nan where there is no next token."""

    def at(self, layer: int, batch: int, pos: int, expert: int) -> dict[str, int | float]:
        """Every value of one expert at one token. Raises `ValueError` if it was not measured there."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not measured; measured layers are {self.layers}")
        batches, length = self.baseline_loss.shape
        if not (0 <= batch < batches and 0 <= pos < length):
            raise ValueError(f"(batch, pos) = ({batch}, {pos}) is out of range: this table has {batches} x {length} tokens")
        where = (self.layers.index(layer), batch, pos)
        routed = self.expert_index[where].tolist()
        if expert not in routed:
            raise ValueError(
                f"expert {expert} is not routed at layer {layer}, batch {batch}, pos {pos}: the router chose {routed}; "
                "removing any other expert has an effect of exactly 0"
            )
        slot = (*where, routed.index(expert))
        values = {name: float(getattr(self, name)[slot]) for name in PER_SLOT if name != "expert_index"}
        return {"slot": slot[-1], **values, "baseline_loss": float(self.baseline_loss[batch, pos])}


PER_SLOT = [f.name for f in fields(ExpertEffects) if f.name not in ("layers", "baseline_loss")]


def concatenate(parts: list[ExpertEffects], axis: Literal["layer", "batch"]) -> ExpertEffects:
    """Join tables of the same tokens at other layers, or of the same layers at other batch rows."""
    first = parts[0]
    dim = 0 if axis == "layer" else 1
    joined = {name: torch.cat([getattr(part, name) for part in parts], dim) for name in PER_SLOT}
    if axis == "layer":
        return ExpertEffects(
            layers=[layer for part in parts for layer in part.layers], baseline_loss=first.baseline_loss, **joined
        )
    return ExpertEffects(layers=first.layers, baseline_loss=torch.cat([part.baseline_loss for part in parts]), **joined)
