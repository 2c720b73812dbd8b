"""What a tracing result says, as a table: every number with its interval, over the cases that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.circuits.tracing.places import PLACES
from hooked_moe.circuits.tracing.result import TracingResult
from hooked_moe.circuits.tracing.selection import Candidate, candidates, estimate, relation_folds, stability
from hooked_moe.tables.schemas import schema_of, table_with_schema

TOP, TOP_OF_EACH = 5, 2
"""Candidates that are reported: where one token is patched, and of each place where several are."""
SEEDS, THRESHOLDS = range(5), (0.3, 0.4, 0.5, 0.6, 0.7)
"""Splits and recurrences under which the choice is repeated."""
FOLDS = 5

FINDINGS = schema_of(
    ("quantity", pa.string(), "1", "what the row is about"),
    ("place", pa.string(), "1", "which token is patched; empty for what is of no patch"),
    ("layer", pa.int32(), "index", "layer; empty for what is of all layers"),
    ("expert", pa.int32(), "index", "expert; empty for what is of none"),
    ("unit", pa.string(), "1", "unit of the numbers"),
    ("n", pa.int32(), "cases", "validation cases that have a value"),
    ("mean", pa.float64(), "as unit says", "mean over these"),
    ("low", pa.float64(), "as unit says", "lower end of the 95% percentile-bootstrap interval over cases"),
    ("high", pa.float64(), "as unit says", "upper end"),
    ("p", pa.float64(), "1", "two-sided p of a sign-flip test that there is no effect"),
)

OF_AN_EXPERT = {
    "rescue": ("rescue", "logits"),
    "rescue by routing": ("rescue_routing", "logits"),
    "rescue by content": ("rescue_content", "logits"),
    "rescue by a random vector of its length": ("rescue_random", "logits"),
    "direct effect": ("direct", "logits"),
    "first-order estimate": ("first_order", "logits"),
    "removal from the clean run": ("necessity", "logits"),
}
"""Quantity: the column of `experts`, and its unit."""


def findings(result: TracingResult) -> pa.Table:
    """Layers, ceilings, and the candidates with their controls."""
    rows = list(_rows(result))
    return table_with_schema(FINDINGS, {name: [row.get(name) for row in rows] for name in FINDINGS.names})


def _rows(result: TracingResult) -> Iterator[dict[str, Any]]:
    yield _row(result, "clean margin", result.cases["d_clean"].to_numpy(), "logits")
    yield _row(result, "drop by corruption", result.cases["drop"].to_numpy(), "logits")
    for place in result.places:
        top = TOP if len(result.places) == 1 else TOP_OF_EACH
        for row in _of_place(result.at(place), top):
            yield row | {"place": place}


def _of_place(result: TracingResult, top: int) -> Iterator[dict[str, Any]]:
    yield _row(result, "all MLP outputs together", result.site("all_moe")[:, 0], "logits")
    for layer in range(result.identity["n_layers"]):
        for name, site in (("MLP output", "moe_out"), ("attention output", "attn_out"), ("routed experts", "routed_out")):
            yield _row(result, name, result.site(site)[:, layer], "logits", layer)
        yield _row(result, "experts of either run", result.site("union")[:, layer], "logits", layer)
        shared = result.site("shared_out")[:, layer]
        if shared.any():
            yield _row(result, "shared experts", shared, "logits", layer)
    for candidate in result.ranking[:top]:
        yield from _of_expert(result, candidate.layer, candidate.expert)


def _of_expert(result: TracingResult, layer: int, expert: int) -> Iterator[dict[str, Any]]:
    def row(quantity: str, values: Float[np.ndarray, " case"], unit: str = "logits") -> dict[str, Any]:
        return _row(result, quantity, values, unit, layer, expert)

    for name, (column, unit) in OF_AN_EXPERT.items():
        yield row(name, result.expert(layer, expert, column), unit)
    own, random = (result.expert(layer, expert, column) for column in ("rescue", "rescue_random"))
    yield row("rescue less that of the random vector", own - random)
    yield row("specificity", result.specificity(layer, expert))
    yield row("specificity against the nearest weight", result.grid.weight_matched(layer, expert))
    equal = result.equal_norm(layer, expert)
    yield row("rescue at equal norm", equal.own)
    yield row("the nearest weight's at equal norm", equal.matched)
    yield row("specificity at equal norm", equal.own - equal.matched)
    rank = result.grid.rank(layer, expert)
    yield row("rank among active experts", rank, "rank")
    yield row("first among active experts", np.where(np.isfinite(rank), (rank == 1).astype(float), np.nan), "share")
    yield row("active", result.grid.active[:, layer, expert].astype(float), "share")


def _row(
    result: TracingResult,
    quantity: str,
    values: Float[np.ndarray, " case"],
    unit: str,
    layer: int | None = None,
    expert: int | None = None,
) -> dict[str, Any]:
    own = np.asarray(values)[~result.discovery]
    own = own[np.isfinite(own)]
    row: dict[str, Any] = {"quantity": quantity, "layer": layer, "expert": expert, "unit": unit, "n": len(own)}
    if len(own) < 2:
        return row
    found = estimate(own, result.protocol.seed)
    p = found.p if unit in ("logits", "nats") else None
    return row | {"mean": found.mean, "low": found.low, "high": found.high, "p": p}


def choice_stability(result: TracingResult) -> dict[str, Any]:
    """How often the same expert is chosen under other splits and recurrences, and with each fold of relations left out."""
    chosen = result.selection
    if chosen is None:
        return {"settings": 0, "same": 0, "relation_folds": 0, "relation_folds_same": 0}
    result = result.at(chosen.place)
    blocks, search = result.site("moe_out"), result.protocol.search
    settings = stability(result.grid, blocks, search, SEEDS, THRESHOLDS)
    same = [found for _, _, found in settings if found is not None and _is(found, chosen)]
    folds = relation_folds(result.cases["relation"].to_pylist(), FOLDS, result.protocol.seed)
    several = np.unique(folds).tolist() if folds.any() else []  # of a single relation nothing can be left out
    left_out = [candidates(result.grid, blocks, folds != fold, search, result.protocol.recurrence) for fold in several]
    return {
        "settings": len(settings),
        "same": len(same),
        "relation_folds": len(left_out),
        "relation_folds_same": sum(bool(found) and _is(found[0], chosen) for found in left_out),
    }


def _is(one: Candidate, other: Candidate) -> bool:
    return (one.layer, one.expert) == (other.layer, other.expert)


def conclusion(result: TracingResult) -> str:
    """One sentence: whether a single expert carries the facts, by the intervals on the validation cases.

    Where several tokens were patched, it is of the place where the best candidate is.
    """
    chosen = result.selection
    result = result.at(result.places[-1] if chosen is None else chosen.place)
    layer = result.layer
    block = result.validated(result.site("moe_out")[:, layer])
    opening = f"The MLP output of layer {layer} restores {block} logits of the margin"
    if result.places != ["final"]:
        opening = f"At {PLACES[result.places[0]]}, the{opening.removeprefix('The')}"
    if chosen is None:
        return f"{opening}; no expert is active in enough cases to be a candidate."
    rescue = result.validated(result.expert(chosen.layer, chosen.expert))
    specific = result.validated(result.specificity(chosen.layer, chosen.expert))
    name = f"expert {chosen.expert} of layer {chosen.layer}"
    if specific.low > 0 and rescue.low > 0:
        return f"{opening}; {name} alone restores {rescue}, and more than the experts beside it: {specific}."
    if specific.high < 0:
        return f"{opening}; the best candidate, {name}, restores {rescue}, less than the experts beside it: {specific}."
    return f"{opening}; no single expert stands out: {name} restores {rescue}, {specific} more than the experts beside it."
