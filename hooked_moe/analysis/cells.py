"""The audit as a query over the effect table: does a ranking of experts predict what their removal costs?

A cell is one ranking in one layer. At every position the ranking picks, among the k active experts, the one it puts
highest and the one it puts lowest; the cell asks whether removing the first changes the loss by more than removing the
second (arXiv 2606.10703, section 4). Rankings by a criterion are fixed for the whole corpus; the controls rank by a score
of the token itself; the oracle ranks by what the experts' removal cost in other documents.

Two populations answer it, from the same rows:
  sample  n positions drawn once and shared by all cells; each position is a pair. This is the paper's protocol.
  all     every valid position; pairs are averaged within a document and the documents are tested, so that the
          resemblance of positions within a document cannot pass for evidence.
d_z is at the scale of the unit tested, so the two populations' d_z are not comparable; `d_position`, the standardised
difference over single positions, is.

Rankings depend on the whole corpus, so the table is read twice: a survey of it first, then the positions under each ranking.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from hooked_moe import statistics
from hooked_moe.analysis.accumulators.contrasts import ContrastAccumulator
from hooked_moe.analysis.accumulators.survey import Survey
from hooked_moe.analysis.cell import Cell, cells_from_table, cells_table, refused_cell
from hooked_moe.analysis.cell_tests import document_cell, sample_cell, with_corrections, with_sign_flips, with_spearman
from hooked_moe.analysis.rankings import TOKEN_LADDER, Scores, corrected_together, rankings
from hooked_moe.checks import whole_numbers
from hooked_moe.tables.effect_grid import EFFECT_VALUES, EffectGrid

__all__ = [
    "AUDIT_COLUMNS",
    "POPULATIONS",
    "Cell",
    "CellAudit",
    "cells_from_table",
    "cells_table",
    "sample_positions",
]

POPULATIONS = ("sample", "all")
AUDIT_COLUMNS = (*dict.fromkeys((*EFFECT_VALUES, *TOKEN_LADDER)),)


def sample_positions(n_valid: int, n: int, seed: int) -> Int[np.ndarray, " n"]:
    """Indices of the sampled positions among the valid ones: the draw of the released code, shared by all cells.

    Raises ValueError where the corpus has fewer than n valid positions.
    """
    if not statistics.MINIMUM_PAIRS <= n <= n_valid:
        raise ValueError(
            f"cannot sample {n} positions: the effect table has {n_valid} with a next token; choose between "
            f"{statistics.MINIMUM_PAIRS} and that many"
        )
    return np.random.RandomState(seed).permutation(n_valid)[:n]


class CellAudit:
    """The second pass: every ranking in every layer over chunks of measured positions, then the cells."""

    def __init__(self, survey: Survey, scores: Scores, n_positions: int, seed: int, scope: str = "position") -> None:
        """Raises ValueError for a sample larger than the measured positions."""
        self.scope, self.seed = scope, seed
        self.layers = survey.layers
        self.scores = scores
        self.rankings = rankings()
        self.sample = sample_positions(survey.n_measured, n_positions, seed)
        self._contrasts = [ContrastAccumulator(survey.documents(), self.rankings, self.sample) for _ in self.layers]
        self._drawn = np.zeros((len(self.sample), 2), np.int64)  # (document, position)
        self._seen = 0

    def update(self, measured: EffectGrid) -> None:
        for layer, contrasts in zip(self.layers, self._contrasts, strict=True):
            delta = measured.delta_loss[:, measured.layer_axis(layer)].astype(np.float64)
            contrasts.update(measured.document, delta, self.scores.of(measured, layer))
        local = self.sample - self._seen
        here = (local >= 0) & (local < len(measured.document))
        self._drawn[here] = np.stack([measured.document, measured.position], axis=1)[local[here]]
        self._seen += len(measured.document)

    def frozen_positions(self) -> pa.Table:
        """The sampled (document, position) pairs, in the order drawn."""
        return pa.table({"document": self._drawn[:, 0].astype(np.int32), "position": self._drawn[:, 1].astype(np.int32)})

    def cells(self, populations: Iterable[str] = POPULATIONS, alpha: float = 0.05) -> list[Cell]:
        """Every ranking in every layer, ordered by population, ranking, layer.

        A cell whose statistics are undefined (a constant or unmeasured criterion, too few documents) has outcome "refused" and
        a note, and still counts in the family of tests. Raises ValueError for a population that there is not.
        """
        populations = tuple(populations)
        unknown = [name for name in populations if name not in POPULATIONS]
        if unknown:
            raise ValueError(f"unknown population {unknown[0]!r}; there are {', '.join(POPULATIONS)}")
        cells: list[Cell] = []
        for population in populations:
            members = [
                self._cell(population, ranking, axis, alpha) for ranking in self.rankings for axis in range(len(self.layers))
            ]
            if population == "all":
                sums = [contrasts.sums(ranking) for ranking in self.rankings for contrasts in self._contrasts]
                members = with_spearman(with_sign_flips(members, sums, self.seed), sums, self.seed)
            cells += members
        return with_corrections(cells)

    def _cell(self, population: str, ranking: str, axis: int, alpha: float) -> Cell:
        n_tests = len(corrected_together(ranking)) * len(self.layers)
        blank = refused_cell(self.scope, population, ranking, self.layers[axis], n_tests, alpha)
        contrasts = self._contrasts[axis]
        cell = (
            sample_cell(blank, contrasts.sample(ranking))
            if population == "sample"
            else document_cell(blank, contrasts.sums(ranking))
        )
        why = self.scores.unmeasured(ranking)
        return replace(cell, note=why) if why else cell


def chosen_layers(chunk: EffectGrid, layers: Iterable[int] | None) -> tuple[int, ...]:
    """The layers asked for, in order; all of the table's by default."""
    if layers is None:
        return chunk.layers
    chosen = whole_numbers(layers, "layers")
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ValueError(f"layers must be distinct and at least one, got {chosen}")
    for layer in chosen:
        chunk.layer_axis(layer)
    return tuple(sorted(chosen))
