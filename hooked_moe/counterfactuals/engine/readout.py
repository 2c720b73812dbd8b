"""What a readout is: numbers made of where variants end up, beside the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class Final:
    """Where variants end up: the residual streams before the final norm, of all variants of all layers and of the clean run."""

    model: Transformer
    variants: Float[Tensor, "variant batch token d_model"]
    clean: Float[Tensor, "batch token d_model"]
    targets: Int[Tensor, "batch token"]
    packed: Packed
    """Which tokens these are: windows of `packed.width` tokens, each of which starts at a query."""

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.packed.width

    def at_window_starts(self, x: Shaped[Tensor, "*lead batch token d_model"]) -> Shaped[Tensor, "*lead batch query d_model"]:
        """The token where each window starts: the one that was changed."""
        return x[..., :: self.width, :]


@runtime_checkable
class Readout(Protocol):
    """A readout: a name for its column, and how many tokens from the changed one on it needs."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query *rest"]: ...


@runtime_checkable
class ChecksModel(Protocol):
    """A readout that not every model, or not every batch, has."""

    def check(self, model: Transformer, packed: Packed) -> None:
        """Raise `ValueError` if this model, or these rows, do not have it: before anything is measured."""
        ...


@runtime_checkable
class ReadsLater(Protocol):
    """A readout that needs more tokens at some queries than at others."""

    def widths(self, packed: Packed) -> Int[Tensor, "batch query"]:
        """How many tokens it needs, from each query on."""
        ...


def window_widths(readouts: Iterable[Readout], packed: Packed) -> Int[Tensor, "batch query"]:
    """How many tokens have to be run from each query on, for all readouts."""
    positions = packed.packed_query_positions()
    widths = torch.ones_like(positions)
    for readout in readouts:
        own = readout.widths(packed) if isinstance(readout, ReadsLater) else torch.full_like(positions, readout.width)
        widths = torch.maximum(widths, own)
    return widths


def by_name(readouts: Any, model: Transformer, packed: Packed) -> dict[str, Readout]:
    """Readouts by their names. Raises `ValueError` for what is none, for names that occur twice, and for what the model lacks."""
    if not isinstance(readouts, Iterable) or isinstance(readouts, str):
        raise ValueError(f"readouts must be a list of readouts, as in [KL()], not {readouts!r}")
    named: dict[str, Readout] = {}
    for readout in list(readouts):
        if isinstance(readout, type) or not isinstance(readout, Readout):
            raise ValueError(f"readouts must be a list of readouts, as in [KL()]; {readout!r} is none")
        if readout.name in named:
            raise ValueError(f"readouts need different names; {readout.name!r} occurs twice")
        if isinstance(readout, ChecksModel):
            readout.check(model, packed)
        named[readout.name] = readout
    return named
