"""What `run_with_cache` keeps of each activation, and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.hooks.hook_table import axes_of


def index_of(where: Any) -> Any:
    """What indexes an axis: TransformerLens's slices, where a tuple is a range, (1, 5) for 1:5, and None is everything."""
    where = getattr(where, "slice", where)  # of its class `Slice`
    return slice(None) if where is None else slice(*where) if isinstance(where, tuple) else where


def take(x: Tensor, where: Any, axis: int) -> Tensor:
    """The part of an axis; a whole number takes the axis away."""
    indices: list[Any] = [slice(None)] * x.dim()
    indices[axis] = index_of(where)
    return x[tuple(indices)]


def with_positions(points: Sequence[HookPoint], leave_others: bool) -> list[HookPoint]:
    """The hook points whose activations have an axis of positions. Raises `ValueError` for others, or leaves them out."""
    kept = [point for point in points if position_axis(point.name) is not None]
    if len(kept) < len(points) and not leave_others:
        name = next(point.name for point in points if position_axis(point.name) is None)
        raise ValueError(
            f"pos_slice cannot select from {name}: it holds the rows routed to one expert, without an axis of positions. Leave "
            "it out of names_filter; hook_expert_out has the same vectors by position"
        )
    return kept


def position_axis(name: str) -> int | None:
    """The axis of positions of an activation; that of queries where keys are positions too."""
    axes = axes_of(name)
    return next((axes.index(axis) for axis in ("pos", "query") if axis in axes), None)


class Kept:
    """Activations as they pass, and where they are asked for the gradients of a scalar with respect to them."""

    def __init__(self, device: torch.device | str | None, pos_slice: Any) -> None:
        self.activations: dict[str, Tensor] = {}
        self.watched: dict[str, Tensor] = {}
        self.device = device
        position = as_int_or_none(index_of(pos_slice))
        self.pos_slice = pos_slice if position is None else [position]

    def keep(self, activation: Tensor, hook: HookPoint) -> None:
        """The hook that keeps an activation, detached."""
        self.activations[hook.name] = self._kept(activation.detach(), hook.name)

    def watch(self, activation: Tensor, hook: HookPoint) -> Tensor | None:
        """The hook that passes on a tensor of its own, so that the gradient is that of this place alone."""
        if not activation.is_floating_point():
            return None
        own = activation.view_as(activation) if activation.requires_grad else activation.requires_grad_()
        self.watched[hook.name] = own
        return own

    def differentiate(self, output: Any) -> None:
        """Keep d output / d activation under the activation's name and "_grad". No gradient of a parameter is computed."""
        if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
            got = type(output).__name__
            if isinstance(output, Tensor):
                got = (
                    f"a tensor {list(output.shape)} that {'requires' if output.requires_grad else 'does not require'} a gradient"
                )
            raise ValueError(
                "incl_bwd differentiates the output, which must be one number, as with return_type='loss', and be computed with "
                f"gradients enabled, not {got}"
            )
        places = list(self.watched.values())  # none, where indices alone are kept
        gradients = torch.autograd.grad(output, places, allow_unused=True, materialize_grads=True) if places else ()
        for name, gradient in zip(self.watched, gradients, strict=True):
            self.activations[f"{name}_grad"] = self._kept(gradient, name)

    def _kept(self, x: Tensor, name: str) -> Tensor:
        axis = position_axis(name)
        if self.pos_slice is not None and axis is not None:
            x = take(x, self.pos_slice, axis).clone()  # not a view, which would keep all positions in memory
        return x if self.device is None else x.to(self.device)
