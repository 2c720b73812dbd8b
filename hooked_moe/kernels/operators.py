"""Operators of the namespace `hooked_moe` in torch: one implementation per device, its shapes, its gradient.

As operators of torch they take part in autograd, in CUDA graphs and in torch.compile, which see them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hooked_moe"


def operator(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `hooked_moe::name` and return it.

    `cpu` is the reference, `cuda` the kernel's launch, `shapes` makes empty results of the right shapes and dtypes, without
    data. `save(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs; without them, there is no gradient.
    """
    whole = f"{NAMESPACE}::{name}"
    torch.library.define(whole, schema)
    torch.library.impl(whole, "cpu", cpu)
    torch.library.impl(whole, "cuda", cuda)
    torch.library.register_fake(whole, shapes)
    if backward is not None:
        torch.library.register_autograd(whole, backward, setup_context=save)
    return getattr(getattr(torch.ops, NAMESPACE), name)
