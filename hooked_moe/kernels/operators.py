"""Operators of the namespace `hooked_moe` in torch: each by its definition on a CPU, and by a kernel on a CUDA device.

As operators of torch they take part in autograd, in CUDA graphs and in torch.compile, which see each whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_moe.kernels.cuda.launches import Unsupported
from hooked_moe.kernels.dispatch import use_reference, warn_once

NAMESPACE = "hooked_moe"


def operator(
    name: str, schema: str, *, definition: Callable[..., Any], launch: Callable[..., Any], shapes: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `hooked_moe::name`, and return what calls it, or its definition where that is chosen (`dispatch`).

    `definition` is in torch's operations, `launch` runs the kernel, `shapes` makes results without data. The gradient is that of
    the definition, computed again when it is asked for: kernels are for measuring, which takes none.
    """
    whole = f"{NAMESPACE}::{name}"
    torch.library.define(whole, schema)
    torch.library.impl(whole, "cpu", definition)
    torch.library.impl(whole, "cuda", launched_or_by_definition(launch, definition))
    torch.library.register_fake(whole, shapes)
    torch.library.register_autograd(whole, _gradient_of(definition), setup_context=_save_inputs)
    registered = getattr(getattr(torch.ops, NAMESPACE), name)

    def call(*arguments: Any) -> Any:
        return definition(*arguments) if use_reference() else registered(*arguments)

    return call


def launched_or_by_definition(launch: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel; the definition, and a warning, where there is none for these sizes."""

    def run(*arguments: Any) -> Any:
        try:
            return launch(*arguments)
        except Unsupported as error:
            warn_once(str(error))
            return definition(*arguments)

    return run


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))


def _gradient_of(definition: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [other if saved is None else saved.detach() for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        needed = [index for index, needs in enumerate(ctx.needs_input_grad) if needs]
        with torch.enable_grad():
            for index in needed:
                inputs[index].requires_grad_()
            output = definition(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad and g is not None]
        wanted = [inputs[index] for index in needed]
        computed = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        by_input = dict(zip(needed, computed, strict=True))
        return tuple(by_input.get(index) for index in range(len(inputs)))

    return backward
