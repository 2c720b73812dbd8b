"""A hook point: a named place in the forward pass where an activation can be read, replaced or differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from hooked_moe.checks import WrongTypeError, described
from hooked_moe.kernels.cpu.alignment import begins_aligned


class HookFunction(Protocol):
    """Called with the activation and its `HookPoint`; returns a replacement of the same shape and dtype, or None."""

    def __call__(self, activation: Tensor, /, *, hook: HookPoint) -> Tensor | None: ...


@dataclass(eq=False)
class _Registered:
    fn: Callable[..., Any]
    permanent: bool = False
    reads_only: bool = False


class HookPoint(nn.Module):
    """An identity that calls its hooks on what passes through it; without hooks it costs one attribute test."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.ctx: dict[str, Any] = {}
        """Facts about the activation that its tensor does not hold, and a place for hooks to keep what they like."""
        self.fwd_hooks: list[_Registered] = []
        self.bwd_hooks: list[_Registered] = []
        self.listened_to: set[HookPoint] | None = None
        """Which points of a group have hooks, for a group that shares one set: it need not ask each of them at every pass."""

    @property
    def active(self) -> bool:
        """Whether any hook is attached. Layouts that only a hook would need are built only then."""
        own, forward = self.fwd_hooks or self.bwd_hooks, self._forward_hooks or self._forward_pre_hooks
        return bool(own or forward or self._backward_hooks or self._backward_pre_hooks)

    @property
    def may_edit(self) -> bool:
        """Whether a hook may change the activation or its gradient. What is only looked at need not be computed from."""
        of_torch = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return bool(self.bwd_hooks or of_torch) or not all(registered.reads_only for registered in self.fwd_hooks)

    def add_hook(
        self, fn: Callable[..., Any], dir: str = "fwd", is_permanent: bool = False, reads_only: bool = False
    ) -> _Registered:
        """Attach `fn(activation, hook=self)` (dir "fwd") or `fn(gradient, hook=self)` (dir "bwd"); later hooks see earlier edits.

        `reads_only` promises that `fn` neither writes to the activation nor returns another: it is not copied for it then, and
        the forward pass takes its fused way around the activation.
        """
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', not {dir!r}")
        if not callable(fn):
            raise WrongTypeError(f"a hook must be a function fn(activation, hook), not {described(fn)}")
        registered = _Registered(fn, is_permanent, reads_only)
        (self.fwd_hooks if dir == "fwd" else self.bwd_hooks).append(registered)
        self._tell_group()
        return registered

    def remove(self, registered: _Registered) -> None:
        self._keep(lambda r: r is not registered)

    def reset(self, including_permanent: bool = False) -> None:
        self._keep(lambda r: r.permanent and not including_permanent)
        self.ctx.clear()

    def _keep(self, kept: Callable[[_Registered], bool]) -> None:
        self.fwd_hooks, self.bwd_hooks = list(filter(kept, self.fwd_hooks)), list(filter(kept, self.bwd_hooks))
        self._tell_group()

    def _tell_group(self) -> None:
        if self.listened_to is not None:
            (self.listened_to.add if self.active else self.listened_to.discard)(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The activation, after the hooks; torch's own hooks count too. Torch's way into a module, spared where nobody listens,
        is much of the time of a small step, which passes hundreds of hook points."""
        if self.active:
            return cast(Tensor, super().__call__(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if not all(registered.reads_only for registered in self.fwd_hooks):
            x = x.clone()  # hooks may write in place, and hook points share memory with each other and with the caller
        for registered in self.fwd_hooks:
            edited = registered.fn(x, hook=self)
            if edited is not None:
                x = laid_out_like(x, self.checked(edited, x))
        if self.bwd_hooks:
            x = self._watch_gradient(x)
        return x

    def checked(self, edited: Any, original: Tensor) -> Tensor:
        """What a hook returned, if it can stand in for the activation."""
        if not isinstance(edited, Tensor):
            raise TypeError(f"the hook on {self.name} returned a {type(edited).__name__}; return a tensor or None")
        if edited.shape != original.shape:
            raise ValueError(f"the hook on {self.name} returned shape {list(edited.shape)}; expected {list(original.shape)}")
        if edited.dtype != original.dtype:
            raise TypeError(
                f"the hook on {self.name} returned {edited.dtype}; expected {original.dtype}: convert with .to(activation)"
            )
        return edited

    def _watch_gradient(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            raise RuntimeError(
                f"a backward hook on {self.name} cannot fire: no gradient flows here. Run with gradients enabled on a model "
                "whose parameters (or whose edited activations) require them."
            )
        x = x.view_as(x)  # a tensor of its own, so that the gradient seen is that of this place alone

        for registered in self.bwd_hooks:

            def on_gradient(gradient: Tensor, fn: Callable[..., Any] = registered.fn) -> Tensor | None:
                edited = fn(gradient, hook=self)
                return None if edited is None else self.checked(edited, gradient)

            x.register_hook(on_gradient)
        return x

    def layer(self) -> int:
        """The block this hook point is in; `ValueError` outside the blocks."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} is not in a block")
        return int(parts[1])

    def extra_repr(self) -> str:
        return self.name


def _telling_the_group(register: Callable[..., Any]) -> Callable[..., Any]:
    def register_and_tell(self: HookPoint, *args: Any, **kwargs: Any) -> Any:
        handle = register(self, *args, **kwargs)
        self._tell_group()
        return handle

    return register_and_tell


for _way in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):  # torch's own
    setattr(HookPoint, f"register_{_way}", _telling_the_group(getattr(nn.Module, f"register_{_way}")))


def laid_out_like(original: Tensor, edited: Tensor) -> Tensor:
    """The edited activation in memory of the original's layout, copied there if it is in another: a view of a transposed tensor,
    say, or a slice that begins in the middle of one.

    The last bits of products depend on how their matrices lie in memory, and are to depend on nothing but the edit.
    """
    if edited.stride() == original.stride() and begins_aligned(edited):
        return edited
    return edited.new_empty_strided(original.shape, original.stride()).copy_(edited)


def keep_unedited_bits(spelled_out: Tensor, fused: Tensor, same: Tensor) -> Tensor:
    """The spelled-out result where a hook changed something, and elsewhere the fused one, to the bit.

    A hook that changes nothing then changes no bit of the output. Gradients always flow through the spelled-out computation,
    which holds the hooked activation: `spelled_out - spelled_out.detach()` is zero in value only.
    """
    return torch.where(same, fused.detach() + (spelled_out - spelled_out.detach()), spelled_out)
