"""What is asked of one part of a measurement, and how a manifest records it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hooked_moe.checks import as_int_or_none, pairs_of_numbers
from hooked_moe.counterfactuals import Order, Scope
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.draw import Draw
from hooked_moe.measurement.tokenized_corpus import DocumentPositions, TokenizedCorpus
from hooked_moe.tables import REMOVAL_ORDERS

Part = Literal["position", "sequence", "progressive", "estimates", "sampled"]
BUDGETED_PARTS: tuple[Part, ...] = ("estimates", "sampled")
"""What a budgeted run measures, in this order, in place of all others."""
SCOPES: dict[Part, Scope] = {
    "position": "position",
    "sequence": "sequence",
    "progressive": "position",
    "estimates": "position",
    "sampled": "position",
}
"""What verification has to have looked at before each."""


ProductsName = Literal["bfloat16", "float16"]
"""The dtype in which the products of removals may be made of their change (`expert_effects`)."""


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
    draw: Draw | None = None
    """The removals of part "sampled"."""
    products: ProductsName | None = None
    """The dtype in which products are made of the change alone, in parts "position" and "sampled"; None: as the clean run's."""

    def as_json(self) -> dict[str, Any]:
        """The manifest's record of the part."""
        record: dict[str, Any] = {
            "layers": list(self.layers),
            "positions": "all" if self.positions is None else len(self.positions),
        }
        if self.positions is not None:
            record["positions_sha256"] = positions_sha256(self.positions)
        if self.orders:
            record |= {"orders": list(self.orders), "seed": self.seed}
        if self.products is not None:
            record["products"] = self.products
        if self.draw is not None:
            record |= {"share": self.draw.share, "seed": self.draw.seed, "draw_sha256": self.draw.sha256()}
        return record


def positions_sha256(positions: DocumentPositions) -> str:
    return hashlib.sha256(json.dumps(sorted(positions)).encode()).hexdigest()


def record_fault(part: str, record: Any) -> str | None:
    """What is wrong with a manifest's record of a part, which was read from a file; None if it is one of `PartSpec.as_json`."""
    if part not in get_args(Part):
        return f"is none of {', '.join(map(repr, get_args(Part)))}"
    if not isinstance(record, dict):
        return "is no object"
    sampled = record.get("positions") != "all"
    fields: dict[str, Callable[[Any], bool]] = {
        "layers": lambda value: isinstance(value, list) and all(as_int_or_none(layer) is not None for layer in value),
        "positions": lambda value: not sampled or as_int_or_none(value) is not None,
        "positions_sha256": lambda value: isinstance(value, str) == sampled,
        "orders": lambda value: (value is None) == (part != "progressive") and set(value or ()) <= set(REMOVAL_ORDERS),
        "seed": lambda value: (as_int_or_none(value) is not None) == (part in ("progressive", "sampled")),
        "share": lambda value: isinstance(value, float) == (part == "sampled"),
        "products": lambda value: value is None or value in get_args(ProductsName),
        "draw_sha256": lambda value: isinstance(value, str) == (part == "sampled"),
    }
    for name, is_right in fields.items():
        try:
            right = is_right(record.get(name))
        except TypeError:  # an order that cannot be in a set
            right = False
        if not right:
            return f"has {name} {record.get(name)!r:.80}"
    unknown = record.keys() - fields.keys()
    return f"has {min(unknown)!r}, which is nothing known" if unknown else None


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
