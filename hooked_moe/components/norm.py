"""RMS norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.components.precision import at_least_float32
from hooked_moe.hooks.hook_point import HookPoint, keep_unedited_bits


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w`, computed in float32 and rounded before the weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return self.normalize(x) * self.w

    def normalize(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return F.rms_norm(x, self.w.shape, eps=self.eps)


class HookedRMSNorm(RMSNorm):
    """The same, whose root mean square and normalised vectors can be hooked."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        normalized = self.normalize(x)
        if self.hook_scale.active:
            wide = at_least_float32(x)
            scale = (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()
            edited = self.hook_scale(scale)
            if self.hook_scale.may_edit:
                normalized = keep_unedited_bits((wide / edited).to(x.dtype), normalized, same=edited == scale)
        return self.hook_normalized(normalized) * self.w
