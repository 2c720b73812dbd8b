"""What a forward pass leaves behind: activations by hook name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hooked_moe.checks import UnknownNameError
from hooked_moe.hooks.hook_table import axes_of
from hooked_moe.hooks.names import Name, Names
from hooked_moe.hooks.residual_stack import ResidualStack


class ActivationCache(ResidualStack):
    """Activations by the name of their hook point, in the order they were computed.

    `cache["blocks.3.attn.hook_pattern"]`, or in short `cache["pattern", 3]`; where a short name stands in several places of
    a block, the part is named too: `cache["scale", 3, "ln2"]`. Layer -1 is the last of the model's layers, kept or not.
    The methods that decompose the residual stream are TransformerLens's, and need the `model` that was run.
    """

    def __init__(self, activations: dict[str, Tensor], model: Any = None, has_batch_dim: bool = True) -> None:
        self._activations = activations
        self.model = model
        self.has_batch_dim = has_batch_dim
        self._names = Names(activations, None if model is None else model.cfg.n_layers, kind="activation")

    def __getitem__(self, name: Name) -> Tensor:
        if isinstance(name, str) and name in self._activations:
            return self._activations[name]
        found = self._names.meant(name)
        if len(found) > 1:
            short = name if isinstance(name, str) else name[0]
            raise UnknownNameError(f"{name!r} is in {len(found)} places; give a layer too, as in cache[{short!r}, 3]")
        return self._activations[found[0]]

    def __contains__(self, name: object) -> bool:
        return name in self._activations

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def to(self, device: torch.device | str) -> ActivationCache:
        """Move the activations to another device; returns the cache."""
        self._activations = {name: tensor.to(device) for name, tensor in self._activations.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Take away the batch axis, if it is still there; returns the cache. Raises `ValueError` unless there is one row."""
        if not self.has_batch_dim:
            return self
        with_batch = {name: x for name, x in self._activations.items() if axes_of(name)[:1] == ("batch",)}
        longer = {name: len(x) for name, x in with_batch.items() if len(x) != 1}
        if longer:
            name, rows = next(iter(longer.items()))
            raise ValueError(f"the batch axis is removed from one row only; {name} has {rows}: run one row, or keep the axis")
        self._activations = self._activations | {name: x[0] for name, x in with_batch.items()}
        self.has_batch_dim = False
        return self

    def __repr__(self) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._activations.values())
        return f"ActivationCache({len(self)} activations, {size / 1e6:.1f} MB)"
