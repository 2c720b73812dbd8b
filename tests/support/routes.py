"""Routing tables that are made up, so that a test knows what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hooked_moe.routing import ROUTES, RoutingTable
from hooked_moe.tables import table_with_schema


def routing_of_experts(
    expert: np.ndarray,
    document: np.ndarray,
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    token: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    domains: Sequence[str] | None = None,
) -> RoutingTable:
    """A table of the experts [position layer slot] at the positions of some documents, in order."""
    positions, n_layers, slots = expert.shape
    layers = list(range(n_layers)) if layers is None else list(layers)
    first = np.searchsorted(document, document)
    columns = {
        "document": document[:, None, None],
        "position": (np.arange(positions) - first)[:, None, None],
        "token": (np.zeros(positions, int) if token is None else token)[:, None, None],
        "layer": np.asarray(layers)[:, None],
        "slot": np.arange(slots),
        "expert": expert,
        "routing_weight": np.full(expert.shape, 1 / slots) if weight is None else weight,
        "probability": np.full(expert.shape, 1 / n_experts),
        "entropy": np.zeros(expert.shape),
        "margin": np.zeros(expert.shape),
        "sink": np.zeros(expert.shape, bool),
    }
    rows = {name: np.broadcast_to(values, expert.shape).ravel() for name, values in columns.items()}
    rows = {name: values.astype(ROUTES.field(name).type.to_pandas_dtype()) for name, values in rows.items()}
    names = ["a"] * (int(document.max()) + 1) if domains is None else list(domains)
    table = table_with_schema(ROUTES, rows)
    return RoutingTable("made up", dict.fromkeys(layers, n_experts), slots, names, table)


def random_experts(random: np.random.Generator, positions: int, layers: int, slots: int, n_experts: int) -> np.ndarray:
    """Every token to `slots` different experts, some of them more popular than others."""
    noise = random.gumbel(size=(positions, layers, n_experts)) + np.linspace(0, 1.5, n_experts)
    return np.argsort(-noise, axis=-1)[..., :slots]
