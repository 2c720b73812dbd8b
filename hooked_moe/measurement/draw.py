"""Which removals a budgeted run makes, from the estimates of all: see `statistics.removal_sample`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hooked_moe.statistics.removal_sample import (
    RemovalSample,
    UniformNumbers,
    least_probabilities,
    removal_size,
    sample_factor,
)
from hooked_moe.tables import DRAW, table_with_schema
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks

_COLUMNS = ("expert", "gap_norm", "first_order", "first_order_curved")


class DocumentPicks(NamedTuple):
    """The removals to make in one document, in the order of the table: a number for each."""

    position: np.ndarray
    axis: np.ndarray
    """Which of the run's layers."""
    slot: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True)
class Draw:
    """A sample of a run's removals."""

    share: float
    seed: int
    sample: RemovalSample
    layers: tuple[int, ...]
    n_removals: np.ndarray
    """[layer, expert], those that could be drawn."""
    n_drawn: np.ndarray
    picks: Mapping[int, DocumentPicks]
    """By document; one without picks has none."""

    def sha256(self) -> str:
        """A checksum of all that is drawn."""
        digest = hashlib.sha256()
        for document, picks in sorted(self.picks.items()):
            digest.update(np.array([document, *np.ravel(picks[:3])], "<i8").tobytes())
            digest.update(np.asarray(picks.probability, "<f8").tobytes())
        return digest.hexdigest()

    def table(self) -> pa.Table:
        """One row per layer and expert, as in `tables.DRAW`."""
        n_layers, n_experts = self.n_removals.shape
        columns = {
            "layer": np.repeat(self.layers, n_experts),
            "expert": np.tile(np.arange(n_experts), n_layers),
            "n_removals": self.n_removals.ravel(),
            "n_drawn": self.n_drawn.ravel(),
            "least_probability": self.sample.least.ravel(),
            "gap_scale": np.repeat(self.sample.gap_scale, n_experts),
            "factor": np.full(n_layers * n_experts, self.sample.factor),
        }
        return table_with_schema(DRAW, columns)


def draw_removals(estimates: Path, n_experts: int, share: float, seed: int) -> Draw:
    """Draw `share` of the removals on average. The table is read three times; in memory are 8 bytes for each removal.

    The same table, share and seed give the same draw.
    """
    bend, square, counts, layers = _totals(estimates, n_experts)
    gap_scale = np.divide(bend, square, out=np.zeros(len(bend)), where=square > 0)
    least = least_probabilities(counts, share)
    sizes, floors = [], []
    for chunk in _chunks(estimates):
        axis = np.arange(len(layers))[None, :, None]
        sizes.append(_size(chunk, gap_scale).ravel().astype(np.float32))
        floors.append(least[axis, chunk.expert].ravel().astype(np.float32))
    sample = RemovalSample(gap_scale, least, sample_factor(np.concatenate(floors), np.concatenate(sizes), share))
    picks, n_drawn = _picks(estimates, sample, seed, counts.shape)
    return Draw(share, seed, sample, layers, counts, n_drawn, picks)


def _chunks(estimates: Path) -> Iterator[EffectGrid]:
    """The positions that have a next token."""
    for chunk in effect_chunks(estimates, _COLUMNS, effect="first_order_curved"):
        yield chunk.measured()


def _size(chunk: EffectGrid, gap_scale: np.ndarray) -> np.ndarray:
    assert chunk.first_order is not None
    assert chunk.gap_norm is not None
    return removal_size(chunk.first_order, chunk.delta_loss, chunk.gap_norm, gap_scale[None, :, None])


def _totals(estimates: Path, n_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """By layer: the sum of what curvature adds, without signs, and of squared gap norms; removals by layer and expert."""
    bend, square, counts = np.zeros(0), np.zeros(0), np.zeros((0, n_experts), np.int64)
    layers: tuple[int, ...] = ()
    for chunk in _chunks(estimates):
        assert chunk.first_order is not None
        assert chunk.gap_norm is not None
        if not len(layers):
            layers = chunk.layers
            bend, square, counts = np.zeros(len(layers)), np.zeros(len(layers)), np.zeros((len(layers), n_experts), np.int64)
        bend += np.abs(chunk.delta_loss.astype(np.float64) - chunk.first_order).sum(axis=(0, 2))
        square += np.square(chunk.gap_norm, dtype=np.float64).sum(axis=(0, 2))
        for axis in range(len(layers)):
            counts[axis] += np.bincount(chunk.expert[:, axis].ravel(), minlength=n_experts)
    if not counts.sum():
        raise ValueError(f"{estimates} has no removal with a next token: there is nothing to draw")
    return bend, square, counts, layers


def _picks(
    estimates: Path, sample: RemovalSample, seed: int, shape: tuple[int, ...]
) -> tuple[dict[int, DocumentPicks], np.ndarray]:
    """What is drawn by document, and how many of each layer and expert."""
    numbers = UniformNumbers(seed)
    found: dict[int, list[DocumentPicks]] = {}
    drawn = np.zeros(shape, np.int64)
    for chunk in _chunks(estimates):
        axis = np.arange(len(chunk.layers))[None, :, None]
        probability = sample.probability(axis, chunk.expert, _size(chunk, sample.gap_scale))
        for document in np.unique(chunk.document).tolist():
            own = np.flatnonzero(chunk.document == document)
            row, layer, slot = np.nonzero(numbers.of(document, probability[own].shape) < probability[own])
            np.add.at(drawn, (layer, chunk.expert[own[row], layer, slot]), 1)
            picks = DocumentPicks(chunk.position[own[row]], layer, slot, probability[own[row], layer, slot])
            found.setdefault(document, []).append(picks)
    joined = {document: DocumentPicks(*map(np.concatenate, zip(*parts, strict=True))) for document, parts in found.items()}
    return {document: picks for document, picks in joined.items() if len(picks.position)}, drawn
