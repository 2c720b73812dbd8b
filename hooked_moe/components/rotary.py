"""Rotary position embeddings (Su et al. 2021, RoFormer)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.config import HookedMoEConfig, YarnScaling


class Rotation(NamedTuple):
    """The rotation of every position, shared by all layers and heads: each angle turns one pair of coordinates."""

    cos: Float[Tensor, "batch pos 1 half"]
    sin: Float[Tensor, "batch pos 1 half"]
    interleaved: bool = False
    """Pairs are neighbours (j, j + 1), or else (j, j + half)."""

    def __call__(self, x: Float[Tensor, "batch pos head width"]) -> Float[Tensor, "batch pos head width"]:
        if self.interleaved:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack(self._turned(first, second), dim=-1).flatten(-2)
        return torch.cat(self._turned(*x.chunk(2, dim=-1)), dim=-1)

    def _turned(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first * self.cos - second * self.sin, second * self.cos + first * self.sin

    def at(self, positions: Int[Tensor, "batch query"], repeats: int) -> Rotation:
        """The rotation of some positions in each row, and of `repeats` copies of the batch, from one shared by all rows."""
        cos, sin = (x[0][positions].repeat(repeats, 1, 1, 1) for x in (self.cos, self.sin))
        return Rotation(cos, sin, self.interleaved)


def rotation(positions: Int[Tensor, "batch pos"], cfg: HookedMoEConfig) -> Rotation:
    """Angles `position * frequency`, computed in float32 whatever the dtype of the model."""
    frequencies = _frequencies(cfg.rotary_width, cfg.rotary_base, cfg.rotary_scaling, positions.device)
    angles = positions[..., None, None].float() * frequencies
    scale = 1.0 if cfg.rotary_scaling is None else cfg.rotary_scaling.rotation_scale
    return Rotation((angles.cos() * scale).to(cfg.dtype), (angles.sin() * scale).to(cfg.dtype), cfg.rotary_interleaved)


def _frequencies(width: int, base: float, yarn: YarnScaling | None, device: torch.device) -> Float[Tensor, " half"]:
    """Radians per token: `base^(-2j / width)`, slowed down by YaRN where there is one."""
    on_cpu = torch.device("cpu")  # where powers are rounded as in every other run
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=on_cpu) / width)
    if yarn is None:
        return frequencies.to(device)

    def pair_that_turns(times: float) -> float:
        """Which pair turns this many times within the original context."""
        return width * math.log(yarn.original_ctx / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slow = ((torch.arange(width // 2, dtype=torch.float32, device=on_cpu) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (frequencies / yarn.factor * slow + frequencies * (1 - slow)).to(device)
