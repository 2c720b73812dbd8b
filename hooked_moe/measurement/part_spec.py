"""What is asked of one part of a measurement, and how a manifest records it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hooked_moe.checks import pairs_of_numbers
from hooked_moe.counterfactuals import Order
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.tokenized_corpus import DocumentPositions, TokenizedCorpus

Part = Literal["position", "sequence", "progressive"]


@dataclass(frozen=True)
class PartSpec:
    """One part of a measurement, and how much of it."""

    part: Part
    layers: tuple[int, ...]
    removal: RemovalName = "zero"
    positions: DocumentPositions | None = None
    """Where experts are removed; None: wherever there is a next token. Routing is observed at every token in any case."""
    orders: tuple[Order, ...] = ()
    """The orders of removal in part "progressive"; the other parts have none."""
    seed: int = 0
    """The seed of the random order."""
    first_order: bool = True
    """Whether part "position" measures its column of that name, which takes a backward pass and so all weights in memory."""

    def as_json(self) -> dict[str, Any]:
        """The manifest's record of the part."""
        record: dict[str, Any] = {
            "layers": list(self.layers),
            "positions": "all" if self.positions is None else len(self.positions),
        }
        if self.positions is not None:
            record["positions_sha256"] = hashlib.sha256(json.dumps(sorted(self.positions)).encode()).hexdigest()
        if self.part == "position" and not self.first_order:
            record["first_order"] = False
        if self.orders:
            record |= {"orders": list(self.orders), "seed": self.seed}
        return record


def checked_positions(positions: Iterable[tuple[int, int]] | None, tokenized: TokenizedCorpus) -> DocumentPositions | None:
    """The positions to measure; None for all. Raises `ValueError` if there are none, and for one without a next token."""
    if positions is None:
        return None
    chosen = frozenset(pairs_of_numbers(positions, "positions", "(document, position)"))
    if not chosen:
        raise ValueError("no positions to measure: positions is empty; leave it out to measure all")
    valid = tokenized.valid_positions()
    invalid = sorted(chosen.difference(valid))
    if invalid:
        raise ValueError(
            f"positions {invalid[:5]} have no next token to predict; there are {len(valid)} (document, position) pairs "
            f"that do, such as {valid[0]}"
        )
    return None if len(chosen) == len(valid) else chosen
