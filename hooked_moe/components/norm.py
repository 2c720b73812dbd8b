from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.hook_points import HookPoint


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values in float32; wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w`, computed in float32 and rounded before the weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float, hooked: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.hook_scale = HookPoint() if hooked else nn.Identity()
        self.hook_normalized = HookPoint() if hooked else nn.Identity()

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        wide = at_least_float32(x)
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale).to(x.dtype)) * self.w
