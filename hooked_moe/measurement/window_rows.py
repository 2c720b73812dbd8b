"""From the counterfactuals of a document's windows to rows of its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_moe.corpus import Window
from hooked_moe.counterfactuals import Order
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.measurement.draw import DocumentPicks
from hooked_moe.measurement.tokenized_corpus import DocumentPositions
from hooked_moe.tables import PROGRESSIVE, ROUTING, SAMPLED_EFFECTS, TOKENS
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class Batch:
    """Windows of a document, of one length, that are run together."""

    windows: list[Window]
    """All windows of the document."""
    numbers: list[int]
    """Which of them are in the batch."""
    first: int
    """Where a window's own tokens begin: 1 after a BOS token."""

    @property
    def members(self) -> list[Window]:
        return [self.windows[number] for number in self.numbers]

    def tokens(self) -> Tensor:
        return torch.from_numpy(np.stack([window.tokens for window in self.members]))

    def asked(self, positions: DocumentPositions | None) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of the windows are among those to measure. A window's last token is measured in the next one."""
        if positions is None:
            return None
        first = self.first
        rows = [
            [first <= j < len(w.tokens) - 1 and (w.document, w.start + j - first) in positions for j in range(len(w.tokens))]
            for w in self.members
        ]
        return torch.tensor(rows, dtype=torch.bool, device="cpu")

    def picked(self, picks: DocumentPicks, n_layers: int, n_slots: int) -> Bool[Tensor, "layer batch pos slot"]:
        """Which removals of the windows are among those of the document."""
        chosen = torch.zeros(n_layers, len(self.numbers), len(self.members[0].tokens), n_slots, dtype=torch.bool, device="cpu")
        for row in range(len(self.numbers)):
            here, pos = self.of_window(row, picks)
            chosen[picks.axis[here], row, pos, picks.slot[here]] = True
        return chosen

    def of_window(self, row: int, picks: DocumentPicks) -> tuple[np.ndarray, np.ndarray]:
        """Which picks are of a window, and their places in it. A window's last token is measured in the next one."""
        window = self.windows[self.numbers[row]]
        pos = picks.position - window.start + self.first
        here = np.flatnonzero((pos >= self.first) & (pos < len(window.tokens) - 1))
        return here, pos[here]

    def own(self, row: int) -> slice:
        """The tokens that a window reports: its own, without the one that the next window begins with."""
        number = self.numbers[row]
        stop = len(self.windows[number].tokens)
        return slice(self.first, stop if number == len(self.windows) - 1 else stop - 1)

    def positions(self, row: int) -> np.ndarray:
        """The positions in the document of the tokens that the window reports."""
        own = self.own(row)
        return self.windows[self.numbers[row]].start + np.arange(own.stop - own.start)


def effect_rows(
    batch: Batch, row: int, effects: ExpertEffects, schema: pa.Schema, estimates: Mapping[str, Tensor] = MappingProxyType({})
) -> pa.Table:
    """Rows (position, layer, slot) of one window. `estimates` are columns that are not those of the effects."""
    own, positions = batch.own(row), batch.positions(row)

    def per_slot(values: Tensor) -> np.ndarray:
        return values[:, row, own].transpose(0, 1).cpu().numpy()

    shape = (len(positions), len(effects.layers), effects.expert_index.shape[-1])
    values: dict[str, Callable[[], Any]] = {
        "document": lambda: batch.windows[0].document,
        "position": lambda: positions[:, None, None],
        "layer": lambda: np.asarray(effects.layers)[None, :, None],
        "slot": lambda: np.arange(shape[-1])[None, None, :],
        "expert": lambda: per_slot(effects.expert_index),
        "baseline_loss": lambda: effects.baseline_loss[row, own].cpu().numpy()[:, None, None],
        **{name: partial(per_slot, column) for name, column in estimates.items()},
    }
    columns = {name: values[name]() if name in values else per_slot(getattr(effects, name)) for name in schema.names}
    return _as_table({name: np.broadcast_to(column, shape).ravel() for name, column in columns.items()}, schema)


def sampled_rows(batch: Batch, row: int, effects: ExpertEffects, picks: DocumentPicks) -> pa.Table:
    """Rows of the removals that were drawn in one window."""
    here, pos = batch.of_window(row, picks)
    axis, slot = picks.axis[here], picks.slot[here]

    def at_picks(values: Tensor) -> np.ndarray:
        return values[:, row].cpu().numpy()[axis, pos, slot]

    values = {
        "document": np.full(len(here), batch.windows[0].document),
        "position": picks.position[here],
        "layer": np.asarray(effects.layers)[axis],
        "slot": slot,
        "expert": at_picks(effects.expert_index),
        "inclusion_probability": picks.probability[here],
        "delta_loss": at_picks(effects.delta_loss),
        "kl": at_picks(effects.kl),
    }
    return _as_table(values, SAMPLED_EFFECTS)


def token_rows(batch: Batch, row: int, baseline: Tensor) -> pa.Table:
    own, number = batch.own(row), batch.numbers[row]
    tokens = batch.windows[number].tokens
    n = own.stop - own.start
    values = {
        "document": np.full(n, batch.windows[0].document),
        "position": batch.positions(row),
        "window": np.full(n, number),
        "context_position": np.arange(own.start, own.stop),
        "token": tokens[own],
        "target": np.append(tokens[1:], -1)[own],
        "baseline_loss": baseline[own].cpu().numpy(),
    }
    return _as_table(values, TOKENS)


def removal_rows(batch: Batch, row: int, orders: Sequence[Order], by_order: Sequence[ExpertEffects]) -> pa.Table:
    """Rows (position, layer, order, removed) of one window, at the positions that were measured."""
    own, positions = batch.own(row), batch.positions(row)
    layers = by_order[0].layers

    def by_removed(column: str) -> np.ndarray:
        """[position, layer, order, removed]."""
        parts = [getattr(effects, column)[:, row, own].transpose(0, 1) for effects in by_order]
        return torch.stack(parts, dim=2).cpu().numpy()

    delta = by_removed("delta_loss")
    measured = np.isfinite(delta).all(axis=(1, 2, 3))
    shape = (int(measured.sum()), *delta.shape[1:])
    baseline = by_order[0].baseline_loss[row, own].cpu().numpy()[measured]
    values = {
        "document": np.asarray(batch.windows[0].document),
        "position": positions[measured][:, None, None, None],
        "layer": np.asarray(layers)[:, None, None],
        "order": np.asarray(orders)[:, None],
        "removed": np.arange(1, shape[-1] + 1),
        "delta_loss": delta[measured],
        "kl": by_removed("kl")[measured],
        "baseline_loss": baseline[:, None, None, None],
    }
    return _as_table({name: np.broadcast_to(value, shape).ravel() for name, value in values.items()}, PROGRESSIVE)


def routing_rows(batch: Batch, row: int, model: Transformer, effects: ExpertEffects) -> pa.Table:
    """Rows (layer, expert) of the tokens that one window reports."""
    own = batch.own(row)
    tables = []
    for index, layer in enumerate(effects.layers):
        n_experts = model.cfg.experts_in(layer)
        probability = effects.router_probability[index, row, own, :n_experts].double().cpu().numpy()
        expert = effects.expert_index[index, row, own].cpu().numpy()
        activation = effects.max_activation[index, row, own].cpu().numpy()
        entropy = -np.sum(probability * np.log(np.where(probability > 0, probability, 1.0)), axis=-1)
        largest = np.full(n_experts, -np.inf)
        np.maximum.at(largest, expert.ravel(), activation.ravel())
        values = {
            "document": np.full(n_experts, batch.windows[0].document),
            "layer": np.full(n_experts, layer),
            "expert": np.arange(n_experts),
            "n_tokens": np.bincount(expert.ravel(), minlength=n_experts),
            "document_tokens": np.full(n_experts, len(expert)),
            "sum_probability": probability.sum(axis=0),
            "sum_entropy": np.bincount(expert.ravel(), np.repeat(entropy, expert.shape[-1]), n_experts),
            "max_activation": np.where(largest >= 0, largest, np.nan),
        }
        tables.append(_as_table(values, ROUTING))
    return pa.concat_tables(tables)


def routing_of_document(windows: Sequence[pa.Table]) -> pa.Table:
    """The rows of all windows of a document, summed."""
    columns = {name: np.stack([table[name].to_numpy() for table in windows]) for name in ROUTING.names}
    sums = ("n_tokens", "document_tokens", "sum_probability", "sum_entropy")
    values = {name: column.sum(axis=0) if name in sums else column[0] for name, column in columns.items()}
    return _as_table(values | {"max_activation": np.fmax.reduce(columns["max_activation"], axis=0)}, ROUTING)


def _as_table(values: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    """Arrays as columns of the schema's types; text stays text."""
    arrays = {
        f.name: values[f.name] if f.type == pa.string() else values[f.name].astype(f.type.to_pandas_dtype()) for f in schema
    }
    return pa.table({name: pa.array(array, schema.field(name).type) for name, array in arrays.items()}, schema=schema)
