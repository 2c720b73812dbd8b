"""Running a module with hooks: the part of `HookedMoE` that is not a transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hooked_moe.checks import as_hooks, in_list
from hooked_moe.hooks.activation_cache import ActivationCache
from hooked_moe.hooks.caching import Kept, with_positions
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.hooks.names import Name, Names, is_one_name

NameOrPredicate = Name | Iterable[Name] | Callable[[str], bool]
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
        n_layers = sum(name.endswith(".hook_resid_pre") for name in self.hook_dict)
        self._names = Names(self.hook_dict, n_layers, advice="See model.hook_dict for all names.")

    @property
    def has_hooks(self) -> bool:
        """Whether any hook is attached, a permanent one too."""
        return any(point.active for point in self.hook_dict.values())

    def hook_points(self, which: NamesFilter) -> list[HookPoint]:
        """The hook points of one name, several names, or all that a predicate accepts; None means all.

        Names may be short: "router_logits" is that of every layer, ("router_logits", 3) that of layer 3, ("scale", 3, "ln2") the
        one of two in a part of the block. Raises `UnknownNameError` for a name that does not exist or is ambiguous, and
        `ValueError` for a predicate that accepts none.
        """
        if which is None:
            return list(self.hook_dict.values())
        if callable(which):
            accepted = [point for name, point in self.hook_dict.items() if which(name)]
            if not accepted:
                raise ValueError("the predicate accepts no hook point; see model.hook_dict for the names")
            return accepted
        names: list[Any] = [which] if is_one_name(which) else in_list(which, "names of hook points", "['hook_embed']")
        return [self.hook_dict[full] for name in names for full in self._names.meant(name)]

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
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """A forward pass and its activations, detached, at the hook points that `names_filter` selects (None: all).

        Other hooks on the model apply first: the cache holds what they made of the activation. `device` is where to keep them,
        and `pos_slice` which positions: -1, a range (start, stop), or a list; the axis stays. `remove_batch_dim` takes away the
        batch axis of one row. With `incl_bwd`, the output has to be one number (`return_type="loss"`), and its gradient with
        respect to every kept activation is there too, as `cache["resid_post_grad", 3]`.
        """
        points = self.hook_points(names_filter)
        if pos_slice is not None:
            points = with_positions(points, leave_others=names_filter is None)
        kept = Kept(device, pos_slice)
        watch = [(point, kept.watch, "fwd") for point in points] if incl_bwd else []
        with self._attached(watch), self._attached([(point, kept.keep, "fwd") for point in points], reads_only=True):
            output = self(*args, **kwargs)
        if incl_bwd:
            kept.differentiate(output)
        cache = ActivationCache(kept.activations, self)
        return output, cache.remove_batch_dim() if remove_batch_dim else cache
