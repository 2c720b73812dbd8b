"""How far two routings of the same tokens agree: with and without BOS, in two precisions, of two revisions, base and instruct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from hooked_moe.routing.route_table import RoutingTable
from hooked_moe.statistics.resampling import ratio_bootstrap
from hooked_moe.tables import Axis, Column, GridResult


@dataclass(frozen=True, repr=False)
class RoutingAgreement(GridResult):
    """Means over tokens, by layer."""

    layers: list[int]
    jaccard: Float[np.ndarray, " layer"]
    low: Float[np.ndarray, " layer"]
    high: Float[np.ndarray, " layer"]
    same_set: Float[np.ndarray, " layer"]
    same_first: Float[np.ndarray, " layer"]

    AXES: ClassVar = {"layer": Axis("transformer block", labels="layers")}
    COLUMNS: ClassVar = {
        "jaccard": Column("layer", "1", "experts that both choose, of those that either does, averaged over tokens"),
        "low": Column("layer", "1", "lower end of its 95% interval, over documents; NaN where there is none"),
        "high": Column("layer", "1", "upper end"),
        "same_set": Column("layer", "1", "share of tokens for which both choose the same experts"),
        "same_first": Column("layer", "1", "share of tokens for which both rank the same expert first"),
    }


def routing_agreement(a: RoutingTable, b: RoutingTable, *, seed: int = 0) -> RoutingAgreement:
    """How far two tables of the same tokens agree, layer by layer: mean Jaccard similarity of the sets of experts.

        routing_agreement(routing_table(base, corpus), routing_table(instruct, corpus)).jaccard       # [layer]

    Intervals are from resampling documents (bootstrap-t); there is none where all documents agree alike. Raises `ValueError`
    unless both tables have the same layers, documents, positions and tokens.
    """
    if a.layers != b.layers or len(a.domains) != len(b.domains) or a.n_tokens != b.n_tokens:
        raise ValueError(f"the tables are of different tokens or layers: {a!r} of layers {a.layers}, {b!r} of layers {b.layers}")
    documents = len(a.domains)
    sums, tokens = np.zeros((3, documents, len(a.layers))), np.zeros(documents)
    for one, other in zip(a.grids("expert", positions=_POSITIONS), b.grids("expert", positions=_POSITIONS), strict=True):
        for name in ("document", "position", "token"):
            if not np.array_equal(one[name], other[name]):
                raise ValueError(f"the tables differ in {name}: agreement is of two routings of the same tokens")
        shared = (one["expert"][..., :, None] == other["expert"][..., None, :]).any(-1).sum(-1)
        values = (
            shared / (a.slots + b.slots - shared),
            shared == max(a.slots, b.slots),
            one["expert"][..., 0] == other["expert"][..., 0],
        )
        tokens += np.bincount(one["document"], minlength=documents)
        for total, value in zip(sums, values, strict=True):
            np.add.at(total, one["document"], value)
    interval = ratio_bootstrap(sums[0], tokens[:, None], seed=seed)
    same_set, same_first = sums[1:].sum(axis=1) / tokens.sum()
    return RoutingAgreement(a.layers, interval.estimate, interval.low, interval.high, same_set, same_first)


_POSITIONS = 1 << 13
"""Read at a time, the same of both tables."""
