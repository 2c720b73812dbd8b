"""Readouts at another token than the changed one: changed at the subject, read at the end of the prompt.

    token_effects(model, tokens, edit, readouts=[At(-1, LogitDifference(" he", " she")), After(1, KL())])

All tokens from the changed one to the one that is read go through the layers. `LossAfter` is of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.counterfactuals.engine.clean_run import gather_positions
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.readout import ChecksModel, Final, Readout, ReadsLater
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class At:
    """A readout taken at one position of the row, wherever the change was: 0 where the change came after it.

    `position` is a place in the rows as given, or, below zero, one counted from the end of each row's tokens: -1 is the last
    that is no padding. A row of numbers gives every batch row its own.
    """

    position: int | Sequence[int] | Int[Tensor, " batch"]
    readout: Readout
    name: str = ""
    """By default that of the readout and the position, as "logit_difference@-1"."""
    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        rows = self.position.tolist() if hasattr(self.position, "tolist") else self.position
        number = as_int_or_none(rows)
        numbers = [as_int_or_none(each) for each in rows] if number is None and isinstance(rows, Sequence) else [number]
        if None in numbers or not numbers or isinstance(rows, str):
            raise ValueError(f"At takes a position, or one for each batch row, not {self.position!r}")
        object.__setattr__(self, "position", tuple(numbers) if number is None else number)
        _require_single_token(self)
        _set_name(self, f"{self.readout.name}@{'rows' if number is None else number}")

    def check(self, model: Transformer, packed: Packed) -> None:
        """Raise `ValueError` unless every row has a token there, and the readout can be taken of this model."""
        _check_inner(self.readout, model, packed)
        rows = len(packed.rows)
        if isinstance(self.position, tuple) and len(self.position) != rows:
            raise ValueError(f"At has {len(self.position)} positions for {rows} batch rows: give one, or one for each row")
        real = (packed.original_positions == self.original_positions(packed)[:, None]).any(-1)
        if not bool(real.all()):
            row = int((~real).nonzero()[0])
            position = self.position[row] if isinstance(self.position, tuple) else self.position
            raise ValueError(f"position {position} cannot be read in batch row {row}: it is padding, or outside of the row")

    def packed_positions(self, packed: Packed) -> Int[Tensor, "batch query"]:
        """The packed position to read, for every query."""
        position = (packed.original_positions == self.original_positions(packed)[:, None]).int().argmax(-1)
        return position[:, None].expand(-1, packed.queries)

    def widths(self, packed: Packed) -> Int[Tensor, "batch query"]:
        """How many tokens have to be run: up to the one that is read."""
        return (self.packed_positions(packed) - packed.packed_query_positions() + 1).clamp(min=1)

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query *rest"]:
        positions = self.packed_positions(final.packed)
        values = _read_at(self.readout, final, positions)
        earlier = (positions < final.packed.packed_query_positions()).view(1, *positions.shape, *[1] * (values.dim() - 3))
        return values.masked_fill(earlier, 0.0)

    def original_positions(self, packed: Packed) -> Int[Tensor, " batch"]:
        """The position to read in every row, as it was given."""
        rows = packed.rows
        if isinstance(self.position, tuple):
            positions = torch.tensor(self.position, dtype=torch.int64, device=rows.device)[rows]
        else:
            assert isinstance(self.position, int)
            positions = torch.full_like(rows, self.position)
        from_end = (packed.original_positions >= 0).sum(-1) + positions
        there = packed.original_positions.gather(1, from_end.clamp(0, packed.tokens.shape[1] - 1)[:, None])[:, 0]
        return torch.where(positions >= 0, positions, there.masked_fill(from_end < 0, -2))


@dataclass(frozen=True)
class After:
    """A readout taken at a fixed number of tokens after the changed one; nan past the end of the row."""

    offset: int
    readout: Readout
    name: str = ""
    """By default that of the readout and the offset, as "kl+1"."""

    def __post_init__(self) -> None:
        if (as_int_or_none(self.offset) or 0) < 0 or as_int_or_none(self.offset) is None:
            raise ValueError(f"After takes a number of tokens from 0, not {self.offset!r}")
        _require_single_token(self)
        _set_name(self, f"{self.readout.name}+{self.offset}")

    @property
    def width(self) -> int:
        return self.offset + 1

    def check(self, model: Transformer, packed: Packed) -> None:
        """Raise `ValueError` unless the readout can be taken of this model."""
        _check_inner(self.readout, model, packed)

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query *rest"]:
        packed = final.packed
        positions = packed.packed_query_positions() + self.offset
        values = _read_at(self.readout, final, positions)
        beyond = positions >= (packed.original_positions >= 0).sum(-1, keepdim=True)
        return values.masked_fill(beyond.view(1, *positions.shape, *[1] * (values.dim() - 3)), float("nan"))


def _read_at(readout: Readout, final: Final, positions: Int[Tensor, "batch query"]) -> Float[Tensor, "variant batch query *rest"]:
    """The readout at one packed position for each query, where it lies in the query's window."""
    offset = (positions - final.packed.packed_query_positions()).clamp(0, final.width - 1)
    token = torch.arange(final.packed.queries, device=offset.device) * final.width + offset
    batch = torch.arange(len(token), device=token.device)[:, None]
    there = replace(final.packed, query_positions=positions, width=1)
    return readout(
        Final(
            final.model,
            final.variants[:, batch, token],
            gather_positions(final.clean, token),
            final.targets[batch, token],
            there,
        )
    )


def _check_inner(readout: Readout, model: Transformer, packed: Packed) -> None:
    if isinstance(readout, ChecksModel):
        readout.check(model, packed)


def _require_single_token(outer: Any) -> None:
    readout, kind = outer.readout, type(outer).__name__
    if isinstance(readout, type) or not isinstance(readout, Readout):
        raise ValueError(f"{kind} takes a readout, as in {kind}(1, KL()), not {readout!r}")
    if readout.width != 1 or isinstance(readout, ReadsLater):
        raise ValueError(f"{kind} takes a readout of a single token, as KL() or Loss(), not {readout!r}")


def _set_name(outer: Any, name: str) -> None:
    object.__setattr__(outer, "name", outer.name or name)
