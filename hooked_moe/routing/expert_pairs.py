"""Which experts serve the same tokens: two of one layer, or one and another of the next layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_moe.routing.route_table import RoutingTable
from hooked_moe.statistics.contingency import association
from hooked_moe.tables import Axis, Column, GridResult

MOST_CLUSTERS = 100
"""Documents are counted in at most so many clusters, which bounds the memory; resampling these is as valid."""

_PAIR = "layer expert other"


@dataclass(frozen=True, repr=False)
class ExpertPairs(GridResult):
    """What `coactivation` and `transition` share."""

    layers: list[int]
    """The layer of `expert`."""
    count: Int[np.ndarray, "layer expert other"]
    share: Float[np.ndarray, "layer expert other"]
    """Co-activation as the OLMoE paper defines it: N(both) / N(expert)."""
    lift: Float[np.ndarray, "layer expert other"]
    lift_low: Float[np.ndarray, "layer expert other"]
    lift_high: Float[np.ndarray, "layer expert other"]
    phi: Float[np.ndarray, "layer expert other"]
    phi_low: Float[np.ndarray, "layer expert other"]
    phi_high: Float[np.ndarray, "layer expert other"]

    COLUMNS: ClassVar = {
        "count": Column(_PAIR, "tokens", "tokens that both experts serve"),
        "share": Column(_PAIR, "1", "of the tokens of `expert`, how many `other` serves too; NaN where `expert` serves none"),
        "lift": Column(_PAIR, "1", "P(both) / (P(expert) P(other)): 1 where independent"),
        "lift_low": Column(_PAIR, "1", "lower end of the 95% interval of lift, over documents"),
        "lift_high": Column(_PAIR, "1", "upper end"),
        "phi": Column(_PAIR, "1", "correlation of the two, as 0 and 1 at each token"),
        "phi_low": Column(_PAIR, "1", "lower end of the 95% interval of phi, over documents"),
        "phi_high": Column(_PAIR, "1", "upper end"),
    }

    def plot(self, value: str | None = "phi", across: str | None = None, *, layer: int | None = None, **options: Any) -> Any:
        """Expert by expert of one layer (default: the first); an expert with itself is left out of `Coactivation`."""
        from hooked_moe.figures import heat_map  # matplotlib takes a while to load

        if value not in self.COLUMNS or across not in (None, "other"):
            return super().plot(value, across, **options)
        layer = self.layers[0] if layer is None else layer
        values, other = self.array(value)[self.layers.index(layer)].astype(float), self.other_layer(layer)
        if other == layer:
            np.fill_diagonal(values, np.nan)
        words = {"row_label": f"expert of layer {layer}", "column_label": f"expert of layer {other}", "value_label": value}
        return heat_map(values, **({"rows": range(len(values)), "columns": range(len(values))} | words | options))

    def other_layer(self, layer: int) -> int:
        """The layer of `other`."""
        return layer


@dataclass(frozen=True, repr=False)
class Coactivation(ExpertPairs):
    """How two experts of a layer go together; the diagonal is an expert with itself."""

    AXES: ClassVar = {
        "layer": Axis("transformer block", labels="layers"),
        "expert": Axis("routed expert"),
        "other": Axis("another expert of the same layer"),
    }


@dataclass(frozen=True, repr=False)
class Transition(ExpertPairs):
    """How an expert goes together with those that serve the same tokens in a later layer."""

    next_layers: list[int]
    """The layer of `other`, for each of `layers`."""

    AXES: ClassVar = {
        "layer": Axis("transformer block", labels="layers"),
        "expert": Axis("routed expert"),
        "other": Axis("expert of the later layer"),
    }

    def other_layer(self, layer: int) -> int:
        return self.next_layers[self.layers.index(layer)]

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"next_layers": self.next_layers}


def coactivation(
    table: RoutingTable, layers: Sequence[int] | None = None, *, n_resamples: int = 1000, seed: int = 0
) -> Coactivation:
    """How often two experts of a layer serve the same tokens [layer expert expert].

        pairs = coactivation(table, layers=[3])
        pairs.share[0, 7, 12]        # of the tokens of expert 7, how many go to expert 12 too
        pairs.lift, pairs.lift_low, pairs.lift_high

    `share` is N(both) / N(expert), the co-activation of the OLMoE paper (arXiv 2409.02060, section 5). Lift compares it with what
    independent choices would give; the slots of a token go to different experts, so where k of E experts are chosen at random it
    is (1 - 1/k) / (1 - 1/E), not 1. Intervals are over documents (`n_resamples=0`: none).

    Raises `ValueError` for layers that the table lacks.
    """
    chosen = table.chosen_layers(layers)
    return Coactivation(chosen, **_pairs(table, [(layer, layer) for layer in chosen], n_resamples, seed))


def transition(table: RoutingTable, layers: Sequence[int] | None = None, *, n_resamples: int = 1000, seed: int = 0) -> Transition:
    """How often the tokens of an expert go to each expert of the next layer that the table has [layer expert expert].

        steps = transition(table)
        steps.share[0, 7]            # where the tokens of expert 7 of the first layer go in the second: sums to k

    `layers` are those that tokens come from (default: all but the last). Lift is 1 where the two layers choose independently.
    Intervals are over documents, whose tokens are alike (`n_resamples=0`: none).

    Raises `ValueError` for layers that the table lacks, and for the last one, which has no next.
    """
    following = dict(zip(table.layers, table.layers[1:], strict=False))
    chosen = table.chosen_layers(layers if layers is not None else list(following) or None)
    without = [layer for layer in chosen if layer not in following]
    if without:
        raise ValueError(f"no layer of this table comes after layer {without[0]}: it has {table.layers}")
    later = [following[layer] for layer in chosen]
    return Transition(chosen, next_layers=later, **_pairs(table, list(zip(chosen, later, strict=True)), n_resamples, seed))


def _pairs(table: RoutingTable, pairs: list[tuple[int, int]], n_resamples: int, seed: int) -> dict[str, np.ndarray]:
    counts = count_pairs(table, pairs)
    results: dict[str, list[np.ndarray]] = {name: [] for name in ExpertPairs.COLUMNS}
    for place, (one, other) in enumerate(pairs):
        both = counts.both[:, place]
        result = association(both, counts.each[one], counts.each[other], counts.tokens, n_resamples=n_resamples, seed=seed)
        together = both.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = together / counts.each[one].sum(axis=0)[:, None]
        own = {field.name: getattr(result, field.name) for field in fields(result)} | {"count": together, "share": share}
        for name, values in own.items():
            results[name].append(values)
    return {name: np.stack(values) for name, values in results.items()}


@dataclass(frozen=True)
class PairCounts:
    """Tokens by cluster of documents."""

    both: Int[np.ndarray, "cluster pair expert other"]
    each: dict[int, Int[np.ndarray, "cluster expert"]]
    """By layer."""
    tokens: Int[np.ndarray, " cluster"]


def count_pairs(table: RoutingTable, pairs: list[tuple[int, int]]) -> PairCounts:
    """How many tokens are served by an expert of one layer and one of another, for some pairs of layers."""
    clusters = min(MOST_CLUSTERS, len(table.domains))
    layers, n = sorted({layer for pair in pairs for layer in pair}), max(table.experts.values())
    both = np.zeros((clusters, len(pairs), n, n), np.int32)
    each = {layer: np.zeros((clusters, n), np.int64) for layer in layers}
    tokens = np.zeros(clusters, np.int64)
    for grid in table.grids("expert"):
        served = {layer: _one_hot(grid["expert"][:, table.layers.index(layer)], n) for layer in layers}
        for rows in _runs(grid["document"]):
            cluster = int(grid["document"][rows.start]) % clusters
            tokens[cluster] += rows.stop - rows.start
            for layer in layers:
                each[layer][cluster] += served[layer][rows].sum(axis=0, dtype=np.int64)
            for place, (one, other) in enumerate(pairs):
                first, second = served[one][rows].astype(np.float32), served[other][rows].astype(np.float32)
                both[cluster, place] += (first.T @ second).astype(np.int32)  # exact: whole numbers below 2^24
    return PairCounts(both, each, tokens)


def _one_hot(experts: Int[np.ndarray, "token slot"], n: int) -> Bool[np.ndarray, "token expert"]:
    served = np.zeros((len(experts), n), bool)
    np.put_along_axis(served, experts.astype(np.int64), True, axis=1)
    return served


def _runs(documents: Int[np.ndarray, " token"]) -> list[slice]:
    """Where the tokens of each document are."""
    ends = [*(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
