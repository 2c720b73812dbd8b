"""Tensors put away until a later layer asks for them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from hooked_moe.loading.spill import Waiting


class _Place(NamedTuple):
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Shelf:
    """Tensors by name: in memory, or in a file where residual streams wait."""

    def __init__(self, waiting: Waiting | None) -> None:
        self._waiting = waiting
        self._tensors: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, _Place] = {}

    def put(self, name: Hashable, x: Tensor) -> None:
        """Put a tensor away, in place of one of the same name and size."""
        if self._waiting is None:
            self._tensors[name] = x
            return
        start = self._places[name].start if name in self._places else self._waiting.place_for(x)
        self._places[name] = _Place(start, x.shape, x.dtype, x.device)
        self._waiting.put(x, start)

    def take(self, name: Hashable) -> Tensor:
        """The tensor; it stays where it is."""
        if self._waiting is None:
            return self._tensors[name]
        start, shape, dtype, device = self._places[name]
        x = torch.empty(shape, dtype=dtype, device=device)
        self._waiting.get(x, start)
        return x
