"""What documents.html shows: the tokens of documents, and what the removal of each active expert does at each.

A page holds so many bytes. Where a corpus has more, documents are drawn at random, and the page says how many of how many it has.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from hooked_moe.report.explorer.effect_file import EffectFile
from hooked_moe.report.explorer.packing import LogScale, packed
from hooked_moe.report.explorer.texts import Texts
from hooked_moe.tables.effect_grid import EffectGrid

MOST_BYTES = 7_900_000
"""Of the documents on the page, as it keeps them."""
MOST_TOKENS = 2_048
"""Shown of one document."""
SEED = 0
"""Of the sample of documents."""
STEP = 1.15
"""From one value that the page can show to the next: what it shows is off by 7.3% at most."""
RANGE = 15_000.0
"""The largest effect over the smallest that is not shown as 0."""
FULL_COLOUR = 0.99
"""The share of tokens whose largest effect is below the one with the strongest colour."""

EFFECTS = ("delta_loss", "kl", "first_order")
WEIGHTS = LogScale.up_to(1.0, RANGE, STEP)


@dataclass(frozen=True)
class DocumentData:
    """The page: a payload for each document shown, by its number, and the facts that say how to read them."""

    payloads: dict[int, str]
    facts: dict[str, Any]
    about: dict[str, Any]
    """For the sentences of the page."""


def document_data(run: Path, texts: Texts, largest: float, baseline: Sequence[np.ndarray]) -> DocumentData:
    """The documents of a run, or as many as the page has room for.

    `largest` is the size of the largest effect of the run, in nats, and `baseline` the loss of the intact model at every token of
    each document. Raises ValueError where the effect table is no full grid, or has no effects.
    """
    scale = LogScale.up_to(largest, RANGE, STEP)
    payloads: dict[int, str] = {}
    peaks: dict[str, list[Float[np.ndarray, " token"]]] = {name: [] for name in EFFECTS}
    layers: tuple[int, ...] = ()
    most: dict[int, int] = defaultdict(int)  # the highest expert seen in each layer
    slots = used = 0
    with EffectFile(run / "effects.parquet", ("expert", "routing_weight", *EFFECTS)) as source:
        for document in np.random.default_rng(SEED).permutation(len(texts)).tolist():
            grid = source.document(document, MOST_TOKENS)
            if grid is None:
                continue
            payload = packed(_content(texts.of(document, end=MOST_TOKENS), baseline[document][:MOST_TOKENS], grid, scale))
            used += len(payload)
            if payloads and used > MOST_BYTES:
                break
            payloads[document] = payload
            layers, slots = grid.layers, grid.n_slots
            for layer, highest in zip(layers, grid.expert.max(axis=(0, 2)).tolist(), strict=True):
                most[layer] = max(most[layer], highest)
            for name, kept in peaks.items():
                kept.append(_peaks(getattr(grid, name)))
    tops = {name: top for name, kept in peaks.items() if (top := _top(kept)) is not None}
    if not tops:
        raise ValueError(f"{run / 'effects.parquet'} has no measured effect in the documents that are shown; measure them first")
    shown = sorted(payloads)
    facts = {
        "layers": list(layers),
        "slots": slots,
        "experts": [most[layer] + 1 for layer in layers],
        "scales": {"effect": _facts(scale), "weight": _facts(WEIGHTS)},
        "tops": tops,
        "documents": [
            {"number": number, "name": texts.names[number], "domain": texts.domains[number], "tokens": texts.length(number)}
            for number in shown
        ],
    }
    about = {
        "n_shown": len(shown),
        "n_documents": len(texts),
        "seed": SEED,
        "n_cut": sum(texts.length(document) > MOST_TOKENS for document in shown),
        "most_tokens": MOST_TOKENS,
        "step": STEP,
        "off": math.sqrt(STEP) - 1,
        "floor": scale.floor,
        "first_order": "first_order" in tops,
    }
    return DocumentData({number: payloads[number] for number in shown}, facts, about)


def _facts(scale: LogScale) -> dict[str, float]:
    return {"floor": scale.floor, "step": scale.step}


def _content(tokens: list[str], baseline: Float[np.ndarray, " token"], grid: EffectGrid, scale: LogScale) -> bytes:
    """The bytes of a document: the length of its texts in JSON, these, and then planes of one byte for each number.

    The planes are the baseline loss [token]; the low and the high byte of the expert, the routing weight and each effect of
    `EFFECTS`, all as [layer, slot, token]. The first order resembles the realised effect: its plane is the difference of codes.
    """
    if len(tokens) != len(grid.position) or not np.array_equal(grid.position, np.arange(len(tokens))):
        raise ValueError("token_texts.parquet and effects.parquet differ in their tokens; they are not of one measurement")
    words = json.dumps(tokens, ensure_ascii=False, separators=(",", ":")).encode()
    missing = np.full(grid.expert.shape, np.nan)
    delta, kl, first = (
        scale.codes(missing if getattr(grid, name) is None else getattr(grid, name)).view(np.uint8) for name in EFFECTS
    )
    weight = WEIGHTS.codes(missing if grid.routing_weight is None else grid.routing_weight)
    expert = grid.expert.astype(np.uint16)
    planes = ((expert & 255).astype(np.uint8), (expert >> 8).astype(np.uint8), weight, delta, kl, first - delta)
    body = b"".join(np.ascontiguousarray(plane.transpose(1, 2, 0)).tobytes() for plane in planes)
    return struct.pack("<I", len(words)) + words + scale.codes(baseline).tobytes() + body


def _peaks(effect: Float[np.ndarray, "P L K"] | None) -> Float[np.ndarray, " token"]:
    """The size of the largest effect at each token where one was measured."""
    if effect is None:
        return np.zeros(0)
    sizes = np.abs(effect).max(axis=(1, 2), initial=0.0)
    return sizes[~np.isnan(sizes)]


def _top(peaks: list[np.ndarray]) -> float | None:
    """The effect with the strongest colour, of one array for each document, to one digit; None where none was measured."""
    sizes = np.concatenate(peaks) if peaks else np.zeros(0)
    if not len(sizes):
        return None
    top = float(np.quantile(sizes, FULL_COLOUR)) or float(sizes.max()) or 1.0
    return float(f"{top:.0e}")


def largest_effect(top_effects: pa.Table) -> float:
    """The size of the largest effect in a table of EXPERT_TOKENS, which has those of every expert; 0 where it has none."""
    return float(pc.max(pc.abs(top_effects["value"])).as_py() or 0.0)
