from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.hook_points import HookPoint, keep_unedited_bits


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values in float32; wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes that they are written in, also where the caller has torch choose narrower ones."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


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
