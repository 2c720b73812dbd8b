"""Padding, packed away: real tokens moved to the left of each row, and results put back where they belong.

Two coordinates must not be confused. A *packed* position counts the real tokens of a row: `query_positions`, and everything that
the engine computes with. An *original* position is a place in the row as it was given: `original_positions`, and everything that
users see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooked_moe.checks import WrongTypeError, whole_numbers
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class Packed:
    """Batch rows whose real tokens come first. Positions count real tokens only, so nothing else changes for the model."""

    tokens: Int[Tensor, "batch packed"]
    targets: Int[Tensor, "batch packed"]
    """The next token; -1 where the row has none, or where it does not follow directly."""
    original_positions: Int[Tensor, "batch packed"]
    """The original position of each packed token; -1 for what fills the row up."""
    original_length: int
    """Length of the rows before packing."""
    rows: Int[Tensor, " batch"]
    """Which batch row each row is; a part of a batch keeps the numbers of the whole."""
    query_positions: Int[Tensor, "batch query"] | None = None
    """The packed positions to measure; None means all."""
    asked: Bool[Tensor, "batch query"] | None = None
    """Which of `query_positions` were asked for; the others fill the row up."""
    embeddings: Float[Tensor, "batch packed d_model"] | None = None
    """What the run begins with; None means the embeddings of the tokens."""
    width: int = 1
    """How many tokens are run for each query: the one there and those after it."""

    @property
    def queries(self) -> int:
        """Positions measured per row."""
        return self.tokens.shape[1] if self.query_positions is None else self.query_positions.shape[1]

    def embed(self, model: Transformer) -> Float[Tensor, "batch packed d_model"]:
        """The residual stream that the run begins with."""
        return model.embed(self.tokens) if self.embeddings is None else self.embeddings

    def split(self, rows: int) -> Iterator[Packed]:
        """Parts of at most `rows` batch rows."""
        for start in range(0, len(self.tokens), rows):
            yield self._of_rows(slice(start, start + rows))

    def _of_rows(self, part: slice | Int[Tensor, " part"]) -> Packed:
        by_row = ("tokens", "targets", "original_positions", "rows", "query_positions", "asked", "embeddings")
        whole = {name: getattr(self, name) for name in by_row}
        picked: dict[str, Any] = {name: None if value is None else value[part] for name, value in whole.items()}
        return replace(self, **picked)

    def split_queries(self, queries: int) -> Iterator[Packed]:
        """Parts of at most `queries` measured positions per row."""
        if queries >= self.queries:
            yield self
            return
        positions = self.packed_query_positions()
        asked = torch.ones_like(positions, dtype=torch.bool) if self.asked is None else self.asked
        for start in range(0, self.queries, queries):
            part = slice(start, start + queries)
            yield replace(self, query_positions=positions[:, part], asked=asked[:, part])

    def split_by_width(self, widths: Int[Tensor, "batch query"]) -> Iterator[Packed]:
        """Parts whose queries all run the same number of tokens, the fewest first."""
        asked = self.asked_positions() >= 0
        different = widths[asked].unique().tolist()
        if len(different) < 2:
            yield replace(self, width=int(different[0]))
            return
        positions = self.packed_query_positions()
        for width in different:
            own = asked & (widths == width)
            first = own.logical_not().int().argsort(dim=-1, stable=True)[:, : int(own.sum(-1).max())]
            part = replace(self, width=int(width), query_positions=positions.gather(1, first), asked=own.gather(1, first))
            yield part._of_rows(own.any(-1).nonzero()[:, 0])

    def packed_query_positions(self) -> Int[Tensor, "batch query"]:
        """The packed position of each query."""
        if self.query_positions is not None:
            return self.query_positions
        batch, length = self.tokens.shape
        return torch.arange(length, device=self.tokens.device).expand(batch, length)

    def original_query_positions(self) -> Int[Tensor, "batch query"]:
        """The original position of each query; -1 where it only fills the row up."""
        if self.query_positions is None:
            return self.original_positions
        return self.original_positions.gather(1, self.query_positions)

    def asked_positions(self) -> Int[Tensor, "batch query"]:
        """The same, and -1 too where it was not asked for."""
        positions = self.original_query_positions()
        return positions if self.asked is None else positions.masked_fill(~self.asked, -1)

    @cached_property  # to find them, a GPU has to be waited for
    def real(self) -> tuple[Tensor, Tensor]:
        """Row and packed position of every real token."""
        row, position = (self.original_positions >= 0).nonzero(as_tuple=True)
        return row, position

    @cached_property
    def measured(self) -> tuple[Tensor, Tensor]:
        """Row and query of every position asked for."""
        row, query = (self.asked_positions() >= 0).nonzero(as_tuple=True)
        return row, query


class Results:
    """Tables [layer, batch, pos, ...] in the coordinates of the rows before packing, filled part by part.

    What is never filled is nan, or -1 for whole numbers.
    """

    baseline: Float[Tensor, "batch pos"]

    def __init__(self, layers: Sequence[int], shape: tuple[int, int]) -> None:
        self.layers = list(layers)
        self.shape = shape
        self.tables: dict[str, Tensor] = {}
        self.kl_clamped = 0

    def put(
        self,
        name: str,
        values: Shaped[Tensor, "layer batch query *rest"],
        packed: Packed,
        layers: Sequence[int],
        everywhere: bool = False,
    ) -> None:
        """Fill in a part: at its measured positions, or at all positions of its rows."""
        if name not in self.tables:
            self.tables[name] = empty_table(values, (len(self.layers), *self.shape, *values.shape[3:]))
        original = packed.original_positions if everywhere else packed.asked_positions()
        row, query = packed.real if everywhere else packed.measured
        for layer, layer_values in zip(layers, values, strict=True):
            self.tables[name][self.layers.index(layer), packed.rows[row], original[row, query]] = layer_values[row, query]

    def put_kl(self, values: Float[Tensor, "layer batch query variant"], packed: Packed, layers: Sequence[int]) -> None:
        """Fill in a part of the KL divergences; those that rounding put below zero are counted, and are zero."""
        below = values < 0
        self.kl_clamped += int(below.sum())
        self.put("kl", values.masked_fill(below, 0.0), packed, layers)

    def put_at(self, name: str, values: Float[Tensor, " pick"], at: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
        """Fill in single values of a table of this shape."""
        if name not in self.tables:
            self.tables[name] = empty_table(values, shape)
        self.tables[name][at] = values

    def put_baseline(self, values: Float[Tensor, "batch packed"], packed: Packed) -> None:
        """Fill in the clean run's losses of a part."""
        if not hasattr(self, "baseline"):
            self.baseline = empty_table(values, self.shape)
        row, position = packed.real
        self.baseline[packed.rows[row], packed.original_positions[row, position]] = values[row, position]


def empty_table(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A table that is filled nowhere yet; an ordinary tensor in inference mode too, since it may meet what takes gradients."""
    with torch.inference_mode(False):
        return torch.full(shape, float("nan") if like.is_floating_point() else -1, dtype=like.dtype, device=like.device)


def pack(
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | None,
    positions: Iterable[int] | Bool[Tensor, "batch pos"] | None = None,
    embeddings: Float[Tensor, "batch pos d_model"] | None = None,
) -> Packed:
    """Pack the real tokens of every row. `positions` are the original positions to measure; the run begins with `embeddings`.

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
    if embeddings is not None:
        result = replace(result, embeddings=embeddings[rows[:, None], source].masked_fill(~filled[..., None], 0.0))
    if positions is None:
        return result
    asked = _as_mask(positions, tokens) & real
    if not bool(asked.any()):
        raise ValueError("no positions to measure: every one asked for is padding, or none was given")
    asked_packed = asked.gather(-1, source) & filled
    most = int(asked_packed.sum(-1).max())
    query_positions = asked_packed.logical_not().int().argsort(dim=-1, stable=True)[:, :most]
    return replace(result, query_positions=query_positions, asked=asked_packed.gather(-1, query_positions))


def _as_mask(positions: Any, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    rows = isinstance(positions, list | tuple) and len(positions) and all(isinstance(row, list | tuple) for row in positions)
    if rows or str(getattr(positions, "dtype", None)) in ("bool", "torch.bool"):
        asked = torch.as_tensor(positions, device=tokens.device)
        if asked.shape != tokens.shape or asked.dtype != torch.bool:
            raise ValueError(f"positions is {asked.dtype} {list(asked.shape)}; a bool mask must be {list(tokens.shape)}")
        return asked
    try:
        numbers = whole_numbers(positions, "positions")
    except WrongTypeError as error:
        raise WrongTypeError(f"{error}; they are valid in every row, or give a bool mask [batch, pos]") from error
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for position in numbers:
        if not 0 <= position < tokens.shape[1]:
            raise ValueError(f"position {position} is out of range: the rows have positions 0 to {tokens.shape[1] - 1}")
        mask[:, position] = True
    return mask
