"""Single changes, picked one by one: a layer branches at its own tokens, and at each of them in a few of the ways there are.

All picks of a row lie behind one another in the token axis of a single variant, those of the first layer first (`Lanes`), so
that each costs one token through the layers above its own, and nothing is computed for what was not picked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, gather_positions
from hooked_moe.counterfactuals.engine.fan_out import fan_out
from hooked_moe.counterfactuals.engine.lanes import Lanes, Variants
from hooked_moe.counterfactuals.engine.memory import variant_bytes
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.requests import Request
from hooked_moe.counterfactuals.engine.steps import Steps


class PickQuestion(ABC):
    """Changes at single tokens that are numbered at each of them, as the removal of each slot is."""

    picks: Bool[Tensor, "layer batch pos way"]
    """Which are measured, at original positions."""

    @abstractmethod
    def branch(self, clean: CleanBlock, ways: Int[Tensor, "batch query"]) -> Variants:
        """The residual stream after the block, changed at each query in the way of this number: one variant."""

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        """What is read off the clean run of a layer besides: columns [batch, pos, ...], at all positions."""
        return {}


class PickPart(NamedTuple):
    """Some batch rows, and picks of theirs that travel together."""

    packed: Packed
    """Its queries are the picks of all layers, one layer after another."""
    lanes: Lanes
    ways: Int[Tensor, "batch query"]
    layer_number: Int[Tensor, " query"]
    """Which of the layers asked for each query is of."""
    observed: bool
    """Whether another part has the same rows, and observes them."""


def pick_parts(picks: Bool[Tensor, "layer batch pos way"], request: Request) -> Iterator[PickPart]:
    """Parts that fit into memory: as many rows as do, or some of the picks of one row. Rows without picks are observed too."""
    packed = request.packed
    most_rows, most_picks = request.room_for_picks(int(picks.sum((0, 2, 3)).max()))
    for own in packed.split(most_rows):
        of_rows = picks[:, own.rows]
        pieces = [of_rows] if len(own.rows) > 1 else list(_pieces(of_rows, most_picks))
        for number, piece in enumerate(pieces):
            yield _part(piece, own, request.layers, observed=number > 0)


def _pieces(picks: Bool[Tensor, "layer 1 pos way"], most: int) -> Iterator[Bool[Tensor, "layer 1 pos way"]]:
    """A row's picks, at most so many at a time, in the order of their layers."""
    at = picks.flatten().nonzero().flatten()
    for chunk in at.split(most) if len(at) else [at]:
        piece = torch.zeros_like(picks)
        piece.view(-1)[chunk] = True
        yield piece


def _part(picks: Bool[Tensor, "layer batch pos way"], packed: Packed, layers: list[int], observed: bool) -> PickPart:
    """The picks as queries. Where a row has fewer in a layer than another, queries fill it up that nobody asked for."""
    n_ways = picks.shape[-1]
    original = packed.original_positions.clamp(min=0)
    by_position = picks.gather(2, original[None, :, :, None].expand(len(layers), -1, -1, n_ways))
    by_position = by_position & (packed.original_positions >= 0)[None, :, :, None]
    counts = by_position.sum((2, 3)).amax(1).tolist()
    order = by_position.flatten(2).logical_not().int().argsort(dim=-1, stable=True)
    queries = torch.cat([own[:, :count] for own, count in zip(order, counts, strict=True)], dim=1)
    asked = torch.cat([own.flatten(1).gather(1, at[:, :n]) for own, at, n in zip(by_position, order, counts, strict=True)], dim=1)
    ragged = replace(packed, query_positions=queries // n_ways, asked=asked)
    per_layer = torch.tensor(counts, dtype=torch.int64, device=queries.device)
    numbers = torch.arange(len(layers), device=queries.device).repeat_interleave(per_layer)
    return PickPart(ragged, Lanes(dict(zip(layers, counts, strict=True)), 2), queries % n_ways, numbers, observed)


def measure_picks(question: PickQuestion, request: Request, part: PickPart, results: Results) -> Steps[None]:
    """Measure the picks of a part, and put what comes of them into the results."""
    packed, lanes, cfg = part.packed, part.lanes, request.model.cfg

    def observe(clean: CleanBlock) -> None:
        if clean.layer in request.layers and not part.observed:
            for name, values in question.observe(clean).items():
                results.put(name, values[None], packed, [clean.layer], everywhere=True)

    def branch(clean: CleanBlock) -> Variants:
        return question.branch(clean, lanes.tokens_entering(part.ways, clean.layer))

    streams = packed.queries + packed.tokens.shape[1]
    with request.waiting_room(streams * len(packed.tokens) * variant_bytes(cfg)) as waiting:
        forms = request.chunk_size(1), request.products
        out = yield from fan_out(request.model, packed, lanes, branch, None, None, waiting, observe, *forms)
    results.put_baseline(out.baseline, packed)
    row, query = packed.measured
    position = packed.original_query_positions()[row, query]
    at = (part.layer_number[query], packed.rows[row], position, part.ways[row, query])
    shape = tuple(question.picks.shape)
    losses, kl = (values[0, 0][row, query] for values in (out.losses, out.kl))
    baseline = gather_positions(out.baseline, packed.query_positions)[row, query]
    results.put_at("delta_loss", losses - baseline, at, shape)
    below = kl < 0
    results.kl_clamped += int(below.sum())
    results.put_at("kl", kl.masked_fill(below, 0.0), at, shape)
