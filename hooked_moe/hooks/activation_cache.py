"""What a forward pass leaves behind: activations by hook name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hooked_moe.checks import unknown_name, whole_number


class ActivationCache(Mapping[str, Tensor]):
    """Activations by the name of their hook point, in the order they were computed.

    `cache["blocks.3.attn.hook_pattern"]`, or in short `cache["pattern", 3]`; where a short name stands in several places of
    a block, the part is named too: `cache["scale", 3, "ln2"]`. Layer -1 is the last of the model's `n_layers`, kept or not.
    """

    def __init__(self, activations: dict[str, Tensor], n_layers: int | None = None) -> None:
        self._activations = activations
        self._n_layers = n_layers

    def __getitem__(self, name: str | tuple[str | int, ...]) -> Tensor:
        if isinstance(name, tuple):
            name = self._full_name(name)
        try:
            return self._activations[name]
        except KeyError:
            raise unknown_name("activation", name, self._activations) from None

    def _full_name(self, short: tuple[str | int, ...]) -> str:
        if len(short) < 2:
            raise KeyError(f"{short}: give a name and a layer, as in cache['pattern', 3]")
        activation, layer, *part = short
        activation = str(activation).removeprefix("hook_")
        layer = whole_number(layer, "the layer")
        if layer < 0:
            if self._n_layers is None:
                raise KeyError(f"{short}: this cache does not know how many layers there are; count them from 0")
            layer += self._n_layers
        matches = [
            name
            for name in self._activations
            if name.startswith(f"blocks.{layer}.") and name.endswith(f".hook_{activation}") and "experts." not in name
        ]
        matches = [name for name in matches if not part or f".{part[0]}." in name]
        if len(matches) > 1:
            raise KeyError(f"{short} could be any of {matches}; name the part too, as in {(*short, matches[0].split('.')[2])}")
        return matches[0] if matches else f"blocks.{layer}.{'.'.join(map(str, part)) + '.' if part else ''}hook_{activation}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same activations on another device."""
        return ActivationCache({name: tensor.to(device) for name, tensor in self._activations.items()}, self._n_layers)

    def __repr__(self) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._activations.values())
        return f"ActivationCache({len(self)} activations, {size / 1e6:.1f} MB)"
