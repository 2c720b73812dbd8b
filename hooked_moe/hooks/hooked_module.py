"""Running a module with hooks: the part of `HookedMoE` that is not a transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hooked_moe.checks import as_hooks, in_list, unknown_name
from hooked_moe.hooks.activation_cache import ActivationCache
from hooked_moe.hooks.hook_point import HookPoint

NameOrPredicate = str | Iterable[str] | Callable[[str], bool]
Hook = tuple[NameOrPredicate, Callable[..., Any]]
NamesFilter = NameOrPredicate | None


class HookedModule(nn.Module):
    """Finds the `HookPoint`s of its submodules by name and runs with hooks on them, with TransformerLens's meanings."""

    hook_dict: dict[str, HookPoint]

    def name_hook_points(self) -> None:
        """Give every hook point its name; called once, when all submodules exist."""
        self.hook_dict = {}
        for name, module in self.named_modules():
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module

    def hook_points(self, which: NamesFilter) -> list[HookPoint]:
        """The hook points of one name, several names, or all that a predicate accepts; None means all.

        Raises `UnknownNameError` for a name that does not exist and `ValueError` for a predicate that accepts none.
        """
        if which is None:
            return list(self.hook_dict.values())
        if callable(which):
            accepted = [point for name, point in self.hook_dict.items() if which(name)]
            if not accepted:
                raise ValueError("the predicate accepts no hook point; see model.hook_dict for the names")
            return accepted
        names = [which] if isinstance(which, str) else in_list(which, "names of hook points", "['hook_embed']")
        for name in names:
            if not isinstance(name, str) or name not in self.hook_dict:
                raise unknown_name("hook point", name, self.hook_dict, "See model.hook_dict for all names.")
        return [self.hook_dict[name] for name in names]

    def add_hook(self, name: NameOrPredicate, fn: Callable[..., Any], dir: str = "fwd", is_permanent: bool = False) -> None:
        """Attach `fn(activation, hook)` until `reset_hooks`; a permanent hook outlasts that too."""
        for point in self.hook_points(name):
            point.add_hook(fn, dir, is_permanent)

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Detach all hooks that are not permanent, and forget what they kept in `hook.ctx`."""
        for point in self.hook_dict.values():
            point.reset(including_permanent)

    @contextmanager
    def hooks(self, fwd_hooks: Iterable[Hook] = (), bwd_hooks: Iterable[Hook] = ()) -> Iterator[HookedModule]:
        """Attach hooks for the length of a `with` block; others stay as they are. A wrong name attaches none of them."""
        hooks_by_point = [
            (point, fn, direction)
            for direction, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks))
            for which, fn in as_hooks(hooks, f"{direction}_hooks")
            for point in self.hook_points(which)
        ]
        with self._attached(hooks_by_point):
            yield self

    @contextmanager
    def _attached(self, hooks: list[tuple[HookPoint, Callable[..., Any], str]], reads_only: bool = False) -> Iterator[None]:
        attached = [(point, point.add_hook(fn, direction, reads_only=reads_only)) for point, fn, direction in hooks]
        try:
            yield
        finally:
            for point, registered in attached:
                point.remove(registered)

    def run_with_hooks(self, *args: Any, fwd_hooks: Iterable[Hook] = (), bwd_hooks: Iterable[Hook] = (), **kwargs: Any) -> Any:
        """A forward pass with hooks. Backward hooks outlive it in the graph: they fire when the result is differentiated."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(*args, **kwargs)

    def run_with_cache(
        self, *args: Any, names_filter: NamesFilter = None, device: torch.device | str | None = None, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        """A forward pass and its activations, detached, at the hook points that `names_filter` selects (None: all).

        Other hooks on the model apply first: the cache holds what they made of the activation. `device` is where to keep them.
        """
        activations: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            activations[hook.name] = activation.detach().to(device) if device is not None else activation.detach()

        with self._attached([(point, keep, "fwd") for point in self.hook_points(names_filter)], reads_only=True):
            output = self(*args, **kwargs)
        n_layers = sum(name.endswith(".hook_resid_pre") for name in self.hook_dict)
        return output, ActivationCache(activations, n_layers)
