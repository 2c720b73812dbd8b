"""What is added to the corrupted run's residual stream at one token, to give it a part of the clean run back.

With `c_e = w_e E_e(x)` an expert's contribution, a patch of the expert adds `c_e(clean) - c_e(corrupted)`, nothing else being
routed again. It has two parts: `(w_e(clean) - w_e(corrupted)) E_e(corrupted)`, what the routing changed, and
`w_e(clean) (E_e(clean) - E_e(corrupted))`, what the expert's own output changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.controls import ControlPatches, control_patches
from hooked_moe.circuits.tracing.observed import ObservedExperts, ObservedLayer

SITES = ("moe_out", "attn_out", "routed_out", "union", "shared_out")
"""A layer's MLP output; its attention output; the contributions of the experts that are active in the clean run; of those active
in either run; and of the shared experts."""


@dataclass(frozen=True)
class ExpertPatches:
    """Per expert active in the clean run (the first slots) or only in the corrupted one (the others; -1 where there is none)."""

    indices: Int[Tensor, "spot slot"]
    clean_active: Bool[Tensor, "spot slot"]
    corrupt_active: Bool[Tensor, "spot slot"]
    weight_clean: Float[Tensor, "spot slot"]
    weight_corrupt: Float[Tensor, "spot slot"]
    whole: Float[Tensor, "spot slot d_model"]
    routing: Float[Tensor, "spot slot d_model"]
    content: Float[Tensor, "spot slot d_model"]


@dataclass(frozen=True)
class LayerPatches:
    sites: Float[Tensor, "site spot d_model"]
    experts: ExpertPatches | None
    controls: ControlPatches | None

    def variants(self, n_clean: int) -> Float[Tensor, "variant spot d_model"]:
        """The sites, then the experts, by `slots_of`. `n_clean` is how many experts a token goes to."""
        if self.experts is None or self.controls is None:
            _, n_spots, width = self.sites.shape
            return torch.cat([self.sites, self.sites.new_zeros(n_variants(n_clean) - len(SITES), n_spots, width)])
        clean, controls = slice(0, n_clean), self.controls
        parts = (
            self.experts.whole,
            self.experts.routing[:, clean],
            self.experts.content[:, clean],
            controls.random,
            controls.equal_norm,
            controls.matched_equal_norm,
        )
        return torch.cat([self.sites, *(part.transpose(0, 1) for part in parts)])


PARTS = ("rescue_routing", "rescue_content", "rescue_random", "rescue_equal_norm", "matched_equal_norm")
"""What is patched of experts besides their whole difference, by the column that it goes to; only of those that are active in the
clean run: of the others, all of the difference is the routing's, and it has no other expert to be compared with."""


def n_variants(n_clean: int) -> int:
    """How many patches there are of a layer at a token."""
    return len(SITES) + (2 + len(PARTS)) * n_clean


def slots_of(part: str, n_clean: int) -> slice:
    """Which variants patch "whole" experts, those of the clean run before those of the corrupted run alone, or one of `PARTS`."""
    if part == "whole":
        return slice(len(SITES), len(SITES) + 2 * n_clean)
    start = len(SITES) + (2 + PARTS.index(part)) * n_clean
    return slice(start, start + n_clean)


def layer_patches(clean: ObservedLayer, corrupted: ObservedLayer, directions: Float[Tensor, "spot slot d_model"]) -> LayerPatches:
    """All patches of one layer; `directions` are random vectors for the controls."""
    moe_out, attn_out = clean.mlp_out - corrupted.mlp_out, clean.attn_out - corrupted.attn_out
    nothing = torch.zeros_like(moe_out)
    if clean.experts is None or corrupted.experts is None:
        return LayerPatches(torch.stack([moe_out, attn_out, nothing, nothing, nothing]), None, None)
    experts = expert_patches(clean.experts, corrupted.experts)
    routed = (experts.whole * experts.clean_active[..., None]).sum(1)
    shared = nothing
    if clean.experts.shared_out is not None and corrupted.experts.shared_out is not None:
        shared = clean.experts.shared_out - corrupted.experts.shared_out
    sites = torch.stack([moe_out, attn_out, routed, experts.whole.sum(1), shared])
    n_clean = clean.experts.indices.shape[1]
    controls = control_patches(experts.whole[:, :n_clean], clean.experts.weights, directions)
    return LayerPatches(sites, experts, controls)


def expert_patches(clean: ObservedExperts, corrupted: ObservedExperts) -> ExpertPatches:
    """The patches of every expert that is active in either run. `corrupted.asked` are the clean run's experts on its input."""
    assert corrupted.asked is not None
    same = clean.indices[:, :, None] == corrupted.indices[:, None, :]
    kept, only_corrupted = same.any(2), ~same.any(1)
    pick = same.to(clean.weights.dtype)
    weight_corrupt = (pick * corrupted.weights[:, None, :]).sum(2)
    # Of an expert that is active there, the run's own output, so that equal runs differ by exactly nothing.
    own = einsum(pick.to(corrupted.outputs.dtype), corrupted.outputs, "spot slot other, spot other d_model -> spot slot d_model")
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
