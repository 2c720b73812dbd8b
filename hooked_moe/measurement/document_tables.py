"""What is measured of one document: its windows through the counterfactuals, and the rows that come of it.

Each part of a measurement makes tables of its own: `TABLES` says which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.corpus import Window
from hooked_moe.counterfactuals import Order, Scope, expert_effects, expert_observations, progressive_effects
from hooked_moe.counterfactuals.engine.steps import Steps
from hooked_moe.counterfactuals.first_order import first_order_effects
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.window_rows import (
    Batch,
    Positions,
    effect_rows,
    removal_rows,
    routing_of_document,
    routing_rows,
    token_rows,
)
from hooked_moe.tables import EFFECTS, EFFECTS_SEQUENCE, PROGRESSIVE, ROUTING, TOKENS
from hooked_moe.transformer import Transformer

WINDOWS_AT_ONCE = 4

Part = Literal["position", "sequence", "progressive"]
TABLES: dict[Part, dict[str, pa.Schema]] = {
    "position": {"tokens": TOKENS, "effects": EFFECTS, "routing": ROUTING},
    "sequence": {"effects_sequence": EFFECTS_SEQUENCE},
    "progressive": {"progressive": PROGRESSIVE},
}
"""The tables of each part, with a row or more for every document."""


@dataclass(frozen=True)
class Wanted:
    """One part of a measurement, and how much of it."""

    part: Part
    layers: tuple[int, ...]
    removal: RemovalName = "zero"
    positions: Positions | None = None
    """Where to remove experts; None: wherever there is a next token. Routing is observed everywhere in any case."""
    orders: tuple[Order, ...] = ()
    """Of part "progressive"."""
    seed: int = 0
    """Of the random order."""
    first_order: bool = True
    """Of part "position": whether its column of that name is measured. It takes a backward pass, so all weights in memory."""


def measure_document(
    model: Transformer, windows: list[Window], first: int, wanted: Wanted, budget: int | None
) -> Steps[dict[str, pa.Table]]:
    """Every table of one document, in the order of its positions. `first` is where a window's own tokens begin."""
    rows_of = {"position": _position_rows, "sequence": _sequence_rows, "progressive": _progressive_rows}[wanted.part]
    parts: dict[str, list[tuple[int, pa.Table]]] = defaultdict(list)
    for numbers in _equal_lengths(windows):
        batch = Batch(windows, numbers, first)
        found = yield from rows_of(model, batch, wanted, budget)
        for name, tables in found.items():
            parts[name] += zip(numbers, tables, strict=True)
    in_order = {name: [table for _, table in sorted(some, key=lambda p: p[0])] for name, some in parts.items()}
    return {name: routing_of_document(some) if name == "routing" else pa.concat_tables(some) for name, some in in_order.items()}


def _equal_lengths(windows: list[Window]) -> Iterator[list[int]]:
    """Windows that can share a batch without padding: by number, a few at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        by_length[len(window.tokens)].append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), WINDOWS_AT_ONCE):
            yield numbers[start : start + WINDOWS_AT_ONCE]


def _effects(model: Transformer, batch: Batch, wanted: Wanted, scope: Scope, budget: int | None) -> Steps[ExpertEffects]:
    asked = batch.asked(wanted.positions)
    if asked is not None and not asked.any():
        return (yield from expert_observations.steps(model, batch.tokens(), wanted.layers))
    return (
        yield from expert_effects.steps(model, batch.tokens(), wanted.layers, scope, wanted.removal, asked, memory_budget=budget)
    )


def _position_rows(model: Transformer, batch: Batch, wanted: Wanted, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    effects = yield from _effects(model, batch, wanted, "position", budget)
    first_order = _first_order(model, batch, effects, budget) if wanted.first_order else None
    rows = range(len(batch.numbers))
    return {
        "effects": [effect_rows(batch, row, effects, EFFECTS, first_order) for row in rows],
        "tokens": [token_rows(batch, row, effects.baseline_loss[row]) for row in rows],
        "routing": [routing_rows(batch, row, model, effects) for row in rows],
    }


def _sequence_rows(model: Transformer, batch: Batch, wanted: Wanted, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    effects = yield from _effects(model, batch, wanted, "sequence", budget)
    return {"effects_sequence": [effect_rows(batch, row, effects, EFFECTS_SEQUENCE) for row in range(len(batch.numbers))]}


def _progressive_rows(model: Transformer, batch: Batch, wanted: Wanted, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    asked = batch.asked(wanted.positions)
    if asked is not None and not asked.any():
        return {"progressive": [PROGRESSIVE.empty_table() for _ in batch.numbers]}
    by_order = []
    for order in wanted.orders:
        effects = yield from progressive_effects.steps(
            model,
            batch.tokens(),
            wanted.layers,
            order,
            wanted.removal,
            asked,
            seed=(wanted.seed * 1_000_003 + batch.windows[0].document) * 1_000_003 + batch.numbers[0],
            memory_budget=budget,
        )
        by_order.append(effects)
    return {"progressive": [removal_rows(batch, row, wanted.orders, by_order) for row in range(len(batch.numbers))]}


def _first_order(
    model: Transformer, batch: Batch, effects: ExpertEffects, budget: int | None
) -> Float[Tensor, "layer batch pos slot"]:
    """Where effects were measured; nan elsewhere."""
    missing = torch.full_like(effects.delta_loss, float("nan"))
    measured = effects.delta_loss.isfinite()
    if not measured.any():
        return missing
    found = first_order_effects(model, batch.tokens(), effects.layers, memory_budget=budget)
    # By expert, not by slot: two runs in batches of other sizes may order experts of nearly equal weight differently.
    by_expert = missing.new_full(effects.router_probability.shape, float("nan"))
    by_expert.scatter_(-1, found.expert_index, found.first_order.to(by_expert.dtype))
    return by_expert.gather(-1, effects.expert_index).where(measured, missing)
