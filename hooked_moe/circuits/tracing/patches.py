"""What is added to the corrupted run's residual stream at its last token, to give it a part of the clean run back.

With `c_e = w_e E_e(x)` an expert's contribution, a patch of the expert adds `c_e(clean) - c_e(corrupted)`, nothing else being
routed again. It has two parts: `(w_e(clean) - w_e(corrupted)) E_e(corrupted)`, what the routing changed, and
`w_e(clean) (E_e(clean) - E_e(corrupted))`, what the expert's own output changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.observed import ObservedExperts, ObservedLayer

SITES = ("moe_out", "attn_out", "routed_out", "union", "shared_out")
"""A layer's MLP output; its attention output; the contributions of the experts that are active in the clean run; of those active
in either run; and of the shared experts."""


@dataclass(frozen=True)
class ExpertPatches:
    """Per expert active in the clean run (the first slots) or only in the corrupted one (the others; -1 where there is none)."""

    indices: Int[Tensor, "row slot"]
    clean_active: Bool[Tensor, "row slot"]
    corrupt_active: Bool[Tensor, "row slot"]
    weight_clean: Float[Tensor, "row slot"]
    weight_corrupt: Float[Tensor, "row slot"]
    whole: Float[Tensor, "row slot d_model"]
    routing: Float[Tensor, "row slot d_model"]
    content: Float[Tensor, "row slot d_model"]


@dataclass(frozen=True)
class LayerPatches:
    sites: Float[Tensor, "site row d_model"]
    experts: ExpertPatches | None

    def variants(self, n_slots: int) -> Float[Tensor, "variant row d_model"]:
        """The sites, then the experts, then their routing parts, then their content parts."""
        if self.experts is None:
            rows, width = self.sites.shape[1:]
            return torch.cat([self.sites, self.sites.new_zeros(3 * n_slots, rows, width)])
        by_expert = (self.experts.whole, self.experts.routing, self.experts.content)
        return torch.cat([self.sites, *(F.pad(part, (0, 0, 0, n_slots - part.shape[1])).transpose(0, 1) for part in by_expert)])


def layer_patches(clean: ObservedLayer, corrupted: ObservedLayer) -> LayerPatches:
    """All patches of one layer."""
    moe_out, attn_out = clean.mlp_out - corrupted.mlp_out, clean.attn_out - corrupted.attn_out
    nothing = torch.zeros_like(moe_out)
    if clean.experts is None or corrupted.experts is None:
        return LayerPatches(torch.stack([moe_out, attn_out, nothing, nothing, nothing]), None)
    experts = expert_patches(clean.experts, corrupted.experts)
    routed = (experts.whole * experts.clean_active[..., None]).sum(1)
    shared = nothing
    if clean.experts.shared_out is not None and corrupted.experts.shared_out is not None:
        shared = clean.experts.shared_out - corrupted.experts.shared_out
    return LayerPatches(torch.stack([moe_out, attn_out, routed, experts.whole.sum(1), shared]), experts)


def expert_patches(clean: ObservedExperts, corrupted: ObservedExperts) -> ExpertPatches:
    """The patches of every expert that is active in either run. `corrupted.asked` are the clean run's experts on its input."""
    assert corrupted.asked is not None
    same = clean.indices[:, :, None] == corrupted.indices[:, None, :]
    kept, only_corrupted = same.any(2), ~same.any(1)
    pick = same.to(clean.weights.dtype)
    weight_corrupt = (pick * corrupted.weights[:, None, :]).sum(2)
    # Of an expert that is active there, the run's own output, so that equal runs differ by exactly nothing.
    own = einsum(pick.to(corrupted.outputs.dtype), corrupted.outputs, "row slot other, row other d_model -> row slot d_model")
    output_corrupt = torch.where(kept[..., None], own, corrupted.asked)
    weight_clean, difference = clean.weights, clean.outputs - output_corrupt
    lost = torch.where(only_corrupted, corrupted.weights, 0.0)
    lost_outputs = -lost[..., None] * corrupted.outputs
    routing = (weight_clean - weight_corrupt)[..., None] * output_corrupt
    content = weight_clean[..., None] * difference
    whole = weight_clean[..., None] * clean.outputs - weight_corrupt[..., None] * output_corrupt

    def both(of_clean: Tensor, of_corrupted: Tensor) -> Tensor:
        return torch.cat([of_clean, of_corrupted], dim=1)

    return ExpertPatches(
        indices=both(clean.indices, corrupted.indices.masked_fill(~only_corrupted, -1)),
        clean_active=both(torch.ones_like(kept), torch.zeros_like(only_corrupted)),
        corrupt_active=both(kept, only_corrupted),
        weight_clean=both(weight_clean, torch.zeros_like(lost)),
        weight_corrupt=both(weight_corrupt, lost),
        whole=both(whole, lost_outputs),
        routing=both(routing, lost_outputs),
        content=both(content, torch.zeros_like(lost_outputs)),
    )
