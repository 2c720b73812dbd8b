"""Padding, packed away: real tokens moved to the left of each row, and results put back where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.effects import PER_SLOT, ExpertEffects


@dataclass(frozen=True)
class Packed:
    """Batch rows whose real tokens come first. Positions count real tokens only, so nothing else changes for the model."""

    tokens: Int[Tensor, "batch packed"]
    targets: Int[Tensor, "batch packed"]
    """The next token; -1 where the row has none, or where it does not follow directly."""
    source: Int[Tensor, "batch packed"]
    """Where each packed token stood in the row; -1 for what fills the row up."""
    width: int
    """Length of the rows before packing."""
    rows: Int[Tensor, " batch"]
    """Which batch row each row is; a part of a batch keeps the numbers of the whole."""
    positions: Int[Tensor, "batch query"] | None = None
    """The packed positions to measure; None means all."""
    asked: Bool[Tensor, "batch query"] | None = None
    """Which of `positions` were asked for; the others fill the row up."""

    @property
    def queries(self) -> int:
        """Positions measured per row."""
        return self.tokens.shape[1] if self.positions is None else self.positions.shape[1]

    def split(self, rows: int) -> Iterator[Packed]:
        """Parts of at most `rows` batch rows."""
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            yield replace(
                self,
                tokens=self.tokens[part],
                targets=self.targets[part],
                source=self.source[part],
                rows=self.rows[part],
                positions=None if self.positions is None else self.positions[part],
                asked=None if self.asked is None else self.asked[part],
            )

    def spread(self, x: Float[Tensor, "layer batch query slot"]) -> Float[Tensor, "layer batch packed slot"]:
        """Values at the measured positions, nan at the others."""
        if self.positions is None or self.asked is None:
            return x
        full = x.new_full((x.shape[0], *self.tokens.shape, x.shape[-1]), float("nan"))
        row, query = self.asked.nonzero(as_tuple=True)
        full[:, row, self.positions[row, query]] = x[:, row, query]
        return full

    def unpack(self, effects: ExpertEffects) -> ExpertEffects:
        """The table in the positions of the original rows: nan (-1 for indices) at padding."""
        row, place = (self.source >= 0).nonzero(as_tuple=True)
        where = self.source[row, place]
        batch = len(self.source)

        def put(x: Tensor) -> Tensor:
            nothing = float("nan") if x.is_floating_point() else -1
            full = torch.full((x.shape[0], batch, self.width, *x.shape[3:]), nothing, dtype=x.dtype, device=x.device)
            full[:, row, where] = x[:, row, place]
            return full

        per_slot = {name: put(getattr(effects, name)) for name in PER_SLOT}
        return ExpertEffects(layers=effects.layers, baseline_loss=put(effects.baseline_loss[None])[0], **per_slot)


def pack(
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | None,
    positions: Sequence[int] | Bool[Tensor, "batch pos"] | None = None,
) -> Packed:
    """Pack the real tokens of every row. `positions` are the places to measure, in the original rows.

    Raises `ValueError` for positions that do not fit, and for a row without real tokens.
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
    counts = real.sum(-1)
    if not bool(counts.all()):
        raise ValueError(f"batch row {int((counts == 0).nonzero()[0])} has no real tokens: attention_mask is 0 everywhere")
    length = int(counts.max())
    source = real.logical_not().int().argsort(dim=-1, stable=True)[:, :length]
    filled = torch.arange(length, device=tokens.device) < counts[:, None]
    packed = tokens.gather(-1, source).masked_fill(~filled, 0)
    follows = filled[:, 1:] & (source[:, 1:] == source[:, :-1] + 1)
    targets = torch.full_like(packed, -1)
    targets[:, :-1] = packed[:, 1:].masked_fill(~follows, -1)
    rows = torch.arange(len(tokens), device=tokens.device)
    result = Packed(packed, targets, source.masked_fill(~filled, -1), tokens.shape[1], rows)
    if positions is None:
        return result
    asked = _as_mask(positions, tokens) & real
    if not bool(asked.any()):
        raise ValueError("no positions to measure: every one asked for is padding, or none was given")
    asked_packed = asked.gather(-1, source) & filled
    most = int(asked_packed.sum(-1).max())
    places = asked_packed.logical_not().int().argsort(dim=-1, stable=True)[:, :most]
    return replace(result, positions=places, asked=asked_packed.gather(-1, places))


def _as_mask(positions: Any, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    wanted = "a list of positions, valid in every row, or a bool mask [batch, pos]"
    if isinstance(positions, slice):
        raise ValueError(f"positions must be {wanted}, not a slice")
    asked = torch.as_tensor(positions, device=tokens.device)
    if asked.dtype == torch.bool:
        if asked.shape != tokens.shape:
            raise ValueError(f"positions has shape {list(asked.shape)}; a bool mask must be {list(tokens.shape)}")
        return asked
    if asked.dim() > 1 or (asked.is_floating_point() and asked.numel()):
        raise ValueError(f"positions must be {wanted}, not {asked.dtype} {list(asked.shape)}")
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for position in asked.flatten().tolist():
        if not 0 <= position < tokens.shape[1]:
            raise ValueError(f"position {position} is out of range: the rows have positions 0 to {tokens.shape[1] - 1}")
        mask[:, int(position)] = True
    return mask
