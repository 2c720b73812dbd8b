"""What is put in the place of an expert's patch, to see whether that its length alone would have done as much.

Of every expert that the clean run goes to: a random vector of the length of its patch; and a comparison at equal length with
the expert whose routing weight is nearest to its own, each of the two patches scaled to the length of the shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32


@dataclass(frozen=True)
class ControlPatches:
    """Zero where there is no other expert to compare with."""

    random: Float[Tensor, "spot clean_slot d_model"]
    equal_norm: Float[Tensor, "spot clean_slot d_model"]
    """The expert's own patch, scaled."""
    matched_equal_norm: Float[Tensor, "spot clean_slot d_model"]
    """The other expert's, scaled to the same length."""


def control_patches(
    deltas: Float[Tensor, "spot clean_slot d_model"],
    weights: Float[Tensor, "spot clean_slot"],
    directions: Float[Tensor, "spot clean_slot d_model"],
) -> ControlPatches:
    """For the patches of the experts that are active in the clean run. `directions` are random vectors, of any length."""
    norms = at_least_float32(deltas).norm(dim=-1, keepdim=True)
    random = directions / directions.norm(dim=-1, keepdim=True) * norms
    if weights.shape[1] == 1:
        nothing = torch.zeros_like(deltas)
        return ControlPatches(random.to(deltas.dtype), nothing, nothing)
    partner = nearest_weight(weights)[..., None]
    shorter = torch.minimum(norms, norms.gather(1, partner))
    scaled, matched = (
        torch.where(length > 0, shorter / length, 0.0) * at_least_float32(patch)
        for patch, length in (
            (deltas, norms),
            (deltas.gather(1, partner.expand_as(deltas)), norms.gather(1, partner)),
        )
    )
    return ControlPatches(*(patch.to(deltas.dtype) for patch in (random, scaled, matched)))


def nearest_weight(weights: Float[Tensor, "spot slot"]) -> Int[Tensor, "spot slot"]:
    """The slot of the other expert whose weight is nearest to each one's."""
    distance = (weights[:, :, None] - weights[:, None, :]).abs()
    own = torch.eye(weights.shape[1], dtype=torch.bool, device=weights.device)
    return distance.masked_fill(own, float("inf")).argmin(-1)


def random_directions(
    seeds: Sequence[int], n_layers: int, n_slots: int, d_model: int, device: torch.device
) -> Float[Tensor, "layer spot slot d_model"]:
    """Standard normal vectors, drawn in float32 on the CPU: the same of the same seed, however many are drawn beside them."""
    drawn = [
        torch.randn(n_layers, n_slots, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
        for seed in seeds
    ]
    return torch.stack(drawn, dim=1).to(device)
