"""The experts that tell one kind of text from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float

from hooked_moe.routing.route_table import RoutingTable, routing_table
from hooked_moe.statistics.contingency import compare_shares
from hooked_moe.tables import Axis, Column, GridResult
from hooked_moe.transformer import Transformer

Statistic = Literal["risk_difference", "risk_ratio"]


@dataclass(frozen=True, repr=False)
class ExpertContrast(GridResult):
    """How much more often each expert serves tokens of the first texts than of the second."""

    layers: list[int]
    statistic: str
    slots: int
    """Experts per token."""
    value: Float[np.ndarray, "layer expert"]
    low: Float[np.ndarray, "layer expert"]
    high: Float[np.ndarray, "layer expert"]
    first: Float[np.ndarray, "layer expert"]
    second: Float[np.ndarray, "layer expert"]

    AXES: ClassVar = {"layer": Axis("transformer block", labels="layers"), "expert": Axis("routed expert")}
    COLUMNS: ClassVar = {
        "value": Column("layer expert", "1", "the statistic: first - second, or first / second"),
        "low": Column("layer expert", "1", "lower end of its 95% interval, over pairs; NaN with fewer than three"),
        "high": Column("layer expert", "1", "upper end"),
        "first": Column("layer expert", "1", "share of the first texts' tokens that the expert serves"),
        "second": Column("layer expert", "1", "share of the second texts' tokens that the expert serves"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"statistic": self.statistic, "slots": self.slots}

    def prefer(self, n: int) -> dict[int, list[int]]:
        """The n experts that mark the first texts most, no more than k in a layer: for `steer_routes(prefer=...)`."""
        return self._extreme(n, -self.value, self.slots)

    def avoid(self, n: int) -> dict[int, list[int]]:
        """The n experts that mark the second texts most: for `steer_routes(avoid=...)`."""
        return self._extreme(n, self.value, self.value.shape[1])

    def _extreme(self, n: int, order: Float[np.ndarray, "layer expert"], most: int) -> dict[int, list[int]]:
        chosen: dict[int, list[int]] = {}
        for place in np.argsort(order, axis=None, kind="stable"):
            row, expert = divmod(int(place), order.shape[1])
            own = chosen.setdefault(self.layers[row], [])
            if not np.isnan(order[row, expert]) and len(own) < most:
                own.append(expert)
            if sum(map(len, chosen.values())) == n:
                break
        return {layer: experts for layer, experts in sorted(chosen.items()) if experts}


def detect_experts(
    model: Transformer,
    pairs: Sequence[tuple[str, str]],
    statistic: Statistic = "risk_difference",
    *,
    last_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ExpertContrast:
    """The experts that serve one kind of text more than another, from pairs of texts (SteerMoE, arXiv 2509.09660, section 3).

        contrast = detect_experts(model, pairs)              # [(a text of one kind, a text of the other), ...]
        contrast.value, contrast.low, contrast.high          # [layer expert]
        with steer_routes(model, prefer=contrast.prefer(5), avoid=contrast.avoid(5)):
            model.generate("In the beginning")

    "risk_difference" is A1/N1 - A2/N2: N tokens of all first (second) texts, A of which the expert serves; "risk_ratio" is the
    quotient. `last_tokens` counts that many at the end of each text only, where texts share a long beginning. Intervals are from
    resampling pairs. Raises `ValueError` for no pairs, for what is no pair of texts, and for texts of fewer than two tokens.
    """
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic must be one of {', '.join(map(repr, get_args(Statistic)))}, not {statistic!r}")
    if last_tokens is not None and last_tokens < 1:
        raise ValueError(f"last_tokens must be 1 or more, not {last_tokens}")
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"expected pairs of texts, (first, second), not {pair!r}")
    if not pairs:
        raise ValueError("no pairs of texts given")
    texts = ([pair[side] for pair in pairs] for side in (0, 1))
    counts = [_counts(routing_table(model, own, progress=progress), last_tokens) for own in texts]
    (served, tokens), (other_served, other_tokens) = counts
    result = compare_shares(served, tokens, other_served, other_tokens, ratio=statistic == "risk_ratio", seed=seed)
    shape = len(model.cfg.moe_layers), -1
    value, low, high = (ends.reshape(shape) for ends in (result.estimate, result.low, result.high))
    first, second = ((a.sum(axis=0) / n.sum()).reshape(shape) for a, n in counts)
    return ExpertContrast(model.cfg.moe_layers, statistic, model.cfg.experts_per_token, value, low, high, first, second)


def _counts(table: RoutingTable, last: int | None) -> tuple[np.ndarray, np.ndarray]:
    """By document: the tokens that each expert of each layer serves [document layer*expert], and all tokens [document]."""
    n, documents = max(table.experts.values()), len(table.domains)
    served, tokens = np.zeros((documents, len(table.layers) * n), np.int64), np.zeros(documents, np.int64)
    lengths = np.zeros(documents, np.int64)
    for grid in table.grids():
        np.maximum.at(lengths, grid["document"], grid["position"] + 1)
    for grid in table.grids("expert"):
        kept = grid["position"] >= lengths[grid["document"]] - (last or np.iinfo(np.int64).max)
        document, expert = grid["document"][kept], grid["expert"][kept]
        tokens += np.bincount(document, minlength=documents)
        np.add.at(served, (document[:, None, None], expert + np.arange(len(table.layers))[:, None] * n), 1)
    return served, tokens
