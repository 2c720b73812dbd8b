"""Rotary position embeddings (Su et al. 2021, RoFormer), in the half-rotation layout of Llama-style checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """The rotation of every position, shared by all layers: coordinate j turns with coordinate j + d_head/2."""

    cos: Float[Tensor, "batch pos 1 half"]
    sin: Float[Tensor, "batch pos 1 half"]

    def __call__(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


def rotation(positions: Int[Tensor, "batch pos"], d_head: int, base: float, dtype: torch.dtype) -> Rotation:
    """Angles `position * base^(-2j / d_head)`, computed in float32 whatever the dtype of the activations."""
    exponent = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head
    angles = positions[..., None, None].float() * (1.0 / base**exponent)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
