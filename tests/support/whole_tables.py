"""Whole effect tables at once, for tests: what `analyse_run` does over the chunks of a run's files."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.accumulators.survey import Survey
from hooked_moe.analysis.cells import AUDIT_COLUMNS, POPULATIONS, Cell, CellAudit, chosen_layers, sample_positions
from hooked_moe.analysis.criteria import criteria_table
from hooked_moe.analysis.rankings import Scores
from hooked_moe.tables.effect_grid import EFFECT_VALUES, EffectGrid, TableOrPath, effect_chunks


def read_effects(source: TableOrPath, columns: Sequence[str] = EFFECT_VALUES) -> EffectGrid:
    """`effect_chunks`, joined."""
    chunks = list(effect_chunks(source, columns))
    joined: dict[str, Any] = {}
    for field in fields(EffectGrid):
        parts = [getattr(chunk, field.name) for chunk in chunks]
        joined[field.name] = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts[0]
    return EffectGrid(**joined)


def expert_criteria(
    effects: TableOrPath,
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    routing: TableOrPath | None = None,
    expert_weights: TableOrPath | None = None,
) -> pa.Table:
    """The criteria of every expert over all rows of an effect table, as `criteria_table`.

    `layers` keeps some of the table's layers. Rows without delta_loss (a document's last token) count: their token was routed
    like any other. Without `routing` or `expert_weights` the criteria that come from them are NaN.
    """
    accumulator = None
    for chunk in effect_chunks(effects, ("expert", "delta_loss", "routing_weight", "output_norm")):
        if accumulator is None:
            accumulator = ExpertAccumulator(chunk.layers if layers is None else layers, n_experts)
        accumulator.update(chunk)
    assert accumulator is not None  # effect_chunks refuses an empty table
    return criteria_table(accumulator.statistics(routing, expert_weights))


def audit_cells(
    effects: TableOrPath,
    criteria: TableOrPath,
    layers: Sequence[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
    *,
    populations: Sequence[str] = POPULATIONS,
    alpha: float = 0.05,
    scope: str = "position",
) -> list[Cell]:
    """Every criterion, token score and the oracle, in every layer, for each population: the two passes of `analyse_run`.

    `criteria` has columns layer, expert and one per name in CRITERIA (experts.parquet).
    """
    survey = None
    n_experts = max(int(chunk.expert.max()) + 1 for chunk in effect_chunks(effects, ("expert", "delta_loss")))
    for chunk in effect_chunks(effects, ("expert", "delta_loss")):
        survey = survey or Survey(chosen_layers(chunk, layers), n_experts, chunk.layers)
        survey.update(chunk.measured())
    assert survey is not None  # effect_chunks refuses an empty table
    scores = Scores(criteria, survey.sums, survey.layers)
    audit = CellAudit(survey, scores, n_positions, seed, scope)
    for chunk in effect_chunks(effects, AUDIT_COLUMNS):
        audit.update(chunk.measured())
    return audit.cells(populations, alpha)


def frozen_positions(grid: EffectGrid, n: int, seed: int) -> pa.Table:
    """The sampled (document, position) pairs, in the order drawn."""
    valid = np.flatnonzero(grid.valid)
    chosen = valid[sample_positions(len(valid), n, seed)]
    return pa.table({"document": grid.document[chosen], "position": grid.position[chosen]})
