"""In which precision things are computed where that does not follow from the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


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
