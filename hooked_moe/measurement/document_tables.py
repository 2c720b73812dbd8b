"""What is measured of one document: its windows through the counterfactuals, and the rows of its tables.

Each part of a measurement makes tables of its own: `TABLES` says which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.corpus import Window
from hooked_moe.counterfactuals import Scope, expert_effects, expert_observations, progressive_effects
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn
from hooked_moe.counterfactuals.first_order import FirstOrderEffects, first_order_effects
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.measurement.part_spec import Part, PartSpec
from hooked_moe.measurement.window_rows import (
    Batch,
    effect_rows,
    removal_rows,
    routing_of_document,
    routing_rows,
    sampled_rows,
    token_rows,
)
from hooked_moe.tables import EFFECTS, EFFECTS_SEQUENCE, ESTIMATES, PROGRESSIVE, ROUTING, SAMPLED_EFFECTS, TOKENS
from hooked_moe.transformer import Transformer

WINDOWS_PER_BATCH = 4
_ESTIMATES = ("first_order", "first_order_curved")

TABLES: dict[Part, dict[str, pa.Schema]] = {
    "position": {"tokens": TOKENS, "effects": EFFECTS, "routing": ROUTING},
    "sequence": {"effects_sequence": EFFECTS_SEQUENCE},
    "progressive": {"progressive": PROGRESSIVE},
    "estimates": {"tokens": TOKENS, "estimates": ESTIMATES, "routing": ROUTING},
    "sampled": {"sampled_effects": SAMPLED_EFFECTS},
}
"""The tables of each part, with a row or more for every document."""


def measure_document(
    model: Transformer, windows: list[Window], first: int, spec: PartSpec, budget: int | None
) -> Steps[dict[str, pa.Table]]:
    """Every table of one document, in the order of its positions. `first` is where a window's own tokens begin."""
    rows_of = _ROWS_OF[spec.part]
    by_window: dict[str, list[tuple[int, pa.Table]]] = defaultdict(list)
    batches = [Batch(windows, numbers, first) for numbers in _equal_lengths(windows)]
    rows_of_batches = yield from in_turn((rows_of(model, batch, spec, budget) for batch in batches), model.streams)
    for batch, rows in zip(batches, rows_of_batches, strict=True):
        for name, tables in rows.items():
            by_window[name] += zip(batch.numbers, tables, strict=True)
    in_order = {name: [table for _, table in sorted(pairs, key=itemgetter(0))] for name, pairs in by_window.items()}
    return {name: _of_document(name, tables) for name, tables in in_order.items()}


def _of_document(name: str, windows: list[pa.Table]) -> pa.Table:
    """The table of a document, from those of its windows: routing is summed, all else is listed."""
    return routing_of_document(windows) if name == "routing" else pa.concat_tables(windows)


def _equal_lengths(windows: list[Window]) -> Iterator[list[int]]:
    """Windows that can share a batch without padding: by number, a few at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        by_length[len(window.tokens)].append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), WINDOWS_PER_BATCH):
            yield numbers[start : start + WINDOWS_PER_BATCH]


def _effects(model: Transformer, batch: Batch, spec: PartSpec, scope: Scope, budget: int | None) -> Steps[ExpertEffects]:
    asked = batch.asked(spec.positions)
    if asked is not None and not asked.any():
        return (yield from expert_observations.steps(model, batch.tokens(), spec.layers))
    options: dict[str, Any] = {"memory_budget": budget, "products": spec.products}
    return (yield from expert_effects.steps(model, batch.tokens(), spec.layers, scope, spec.removal, asked, **options))


def _position_rows(model: Transformer, batch: Batch, spec: PartSpec, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    asked = batch.asked(spec.positions)
    tasks: list[Steps[Any]] = [_effects(model, batch, spec, "position", budget)]
    if asked is None or asked.any():
        tasks.append(first_order_effects.steps(model, batch.tokens(), spec.layers, memory_budget=budget))
    effects, *first_order = yield from in_turn(tasks, model.streams)
    estimates = _at_effects(effects, *first_order)
    rows = range(len(batch.numbers))
    return {
        "effects": [effect_rows(batch, row, effects, EFFECTS, estimates) for row in rows],
        "tokens": [token_rows(batch, row, effects.baseline_loss[row]) for row in rows],
        "routing": [routing_rows(batch, row, model, effects) for row in rows],
    }


def _sequence_rows(model: Transformer, batch: Batch, spec: PartSpec, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    effects = yield from _effects(model, batch, spec, "sequence", budget)
    return {"effects_sequence": [effect_rows(batch, row, effects, EFFECTS_SEQUENCE) for row in range(len(batch.numbers))]}


def _progressive_rows(model: Transformer, batch: Batch, spec: PartSpec, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    asked = batch.asked(spec.positions)
    if asked is not None and not asked.any():
        return {"progressive": [PROGRESSIVE.empty_table() for _ in batch.numbers]}
    by_order = []
    for order in spec.orders:
        effects = yield from progressive_effects.steps(
            model,
            batch.tokens(),
            spec.layers,
            order,
            spec.removal,
            asked,
            seed=(spec.seed * 1_000_003 + batch.windows[0].document) * 1_000_003 + batch.numbers[0],
            memory_budget=budget,
        )
        by_order.append(effects)
    return {"progressive": [removal_rows(batch, row, spec.orders, by_order) for row in range(len(batch.numbers))]}


def _estimate_rows(model: Transformer, batch: Batch, spec: PartSpec, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    """What is known of every removal without making it: what the clean run and one backward pass say."""
    tasks: list[Steps[Any]] = [
        expert_observations.steps(model, batch.tokens(), spec.layers),
        first_order_effects.steps(model, batch.tokens(), spec.layers, memory_budget=budget),
    ]
    observed, first_order = yield from in_turn(tasks, model.streams)
    columns = {name: _in_slots_of(observed, first_order, name) for name in _ESTIMATES}
    rows = range(len(batch.numbers))
    return {
        "estimates": [effect_rows(batch, row, observed, ESTIMATES, columns) for row in rows],
        "tokens": [token_rows(batch, row, observed.baseline_loss[row]) for row in rows],
        "routing": [routing_rows(batch, row, model, observed) for row in rows],
    }


def _sampled_rows(model: Transformer, batch: Batch, spec: PartSpec, budget: int | None) -> Steps[dict[str, list[pa.Table]]]:
    """The removals that were drawn in a batch; one without any costs nothing."""
    assert spec.draw is not None, "a sample is drawn before it is measured"
    picks = spec.draw.picks.get(batch.windows[0].document)
    chosen = None if picks is None else batch.picked(picks, len(spec.layers), model.cfg.experts_per_token)
    if picks is None or chosen is None or not chosen.any():
        return {"sampled_effects": [SAMPLED_EFFECTS.empty_table() for _ in batch.numbers]}
    effects = yield from expert_effects.steps(
        model,
        batch.tokens(),
        spec.layers,
        "position",
        spec.removal,
        memory_budget=budget,
        picks=chosen,
        products=spec.products,
    )
    return {"sampled_effects": [sampled_rows(batch, row, effects, picks) for row in range(len(batch.numbers))]}


_ROWS_OF: dict[Part, Callable[..., Steps[dict[str, list[pa.Table]]]]] = {
    "position": _position_rows,
    "sequence": _sequence_rows,
    "progressive": _progressive_rows,
    "estimates": _estimate_rows,
    "sampled": _sampled_rows,
}


def _at_effects(
    effects: ExpertEffects, first_order: FirstOrderEffects | None = None
) -> dict[str, Float[Tensor, "layer batch pos slot"]]:
    """First-order effects where effects were measured; nan elsewhere."""
    missing = torch.full_like(effects.delta_loss, float("nan"))
    if first_order is None:
        return dict.fromkeys(_ESTIMATES, missing)
    measured = effects.delta_loss.isfinite()
    return {name: _in_slots_of(effects, first_order, name).where(measured, missing) for name in _ESTIMATES}


def _in_slots_of(effects: ExpertEffects, first_order: FirstOrderEffects, name: str) -> Float[Tensor, "layer batch pos slot"]:
    """A column of first-order effects in the slots of another result.

    By expert, not by slot: two runs in batches of other sizes may order experts of nearly equal weight differently.
    """
    values = getattr(first_order, name)
    by_expert = values.new_full(effects.router_probability.shape, float("nan"), dtype=effects.gap_norm.dtype)
    by_expert.scatter_(-1, first_order.expert_index, values.to(by_expert.dtype))
    return by_expert.gather(-1, effects.expert_index)
