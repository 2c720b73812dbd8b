"""Removals as the released code makes them, from whole texts: of two ranked experts in turn, and of more and more experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from hooked_moe.counterfactuals import expert_observations
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.paper.protocols import Draw
from hooked_moe.paper.published import CONTROL_RANKING
from hooked_moe.paper.sequence_removals import SequenceRemoval, sequence_removals
from hooked_moe.paper.text_shards import TextValues, measure_text_by_text
from hooked_moe.paper.texts import AuditTexts
from hooked_moe.tables import COMPARISONS, RELEASED_PROGRESSIVE, table_with_schema
from hooked_moe.transformer import Transformer


class Pick(NamedTuple):
    """One comparison: which two experts are removed, and where the loss is measured."""

    layer: int
    ranking: str
    text: int
    position: int
    high_expert: int
    low_expert: int
    high_score: float
    low_score: float


def pick_experts(texts: AuditTexts, draws: Mapping[tuple[str, int], Draw]) -> list[Pick]:
    """The active experts ranked highest and lowest at every drawn position, for each (ranking, layer)."""
    return [
        _pick(texts, ranking, layer, text, position)
        for (ranking, layer), draw in draws.items()
        for text, position in draw.tolist()
    ]


def _pick(texts: AuditTexts, ranking: str, layer: int, text: int, position: int) -> Pick:
    rows, row = texts.rows[layer], texts.row_position(text, position)
    experts = rows.expert[text, row]
    if ranking == CONTROL_RANKING:
        scores = rows.routing_weight[text, row].astype(np.float64)
    else:
        scores = texts.criteria[layer][ranking][experts]
    comparable = np.nan_to_num(scores, nan=-np.inf)  # an undefined score ranks last, as it does in pandas
    high, low = int(comparable.argmax()), int(comparable.argmin())
    return Pick(layer, ranking, text, position, int(experts[high]), int(experts[low]), float(scores[high]), float(scores[low]))


def compare_experts(model: Transformer, texts: AuditTexts, picks: Sequence[Pick], shards: ShardFiles, progress: bool) -> pa.Table:
    """The loss without either expert of every comparison, as in `tables.COMPARISONS`."""
    by_text: dict[int, list[int]] = defaultdict(list)
    for number, pick in enumerate(picks):
        by_text[pick.text].append(number)

    def measure(text: int) -> TextValues:
        own = [picks[number] for number in by_text[text]]
        removals = [SequenceRemoval(p.layer, frozenset([e]), p.position) for p in own for e in (p.high_expert, p.low_expert)]
        losses = sequence_removals(model, torch.tensor(texts.tokens[text], dtype=torch.long, device="cpu"), removals)
        delta = losses.removed - losses.baseline
        return np.stack([losses.baseline[::2], delta[::2], delta[1::2]])

    values = np.empty((3, len(picks)))
    for text, measured in measure_text_by_text(model, sorted(by_text), measure, shards, progress).items():
        values[:, by_text[text]] = measured
    columns = dict(zip(Pick._fields, zip(*picks, strict=True), strict=True))
    losses = dict(zip(("baseline_loss", "high_delta", "low_delta"), values, strict=True))
    return table_with_schema(COMPARISONS, columns | losses)


def remove_progressively(
    model: Transformer, layers: Sequence[int], texts: Mapping[int, list[int]], drawn: Draw, shards: ShardFiles, progress: bool
) -> pa.Table:
    """The loss without the most heavily weighted experts, one to k-1 of them, as in `tables.RELEASED_PROGRESSIVE`.

    `texts` are token ids by the number of the text; each has one position in `drawn`.
    """
    k = model.cfg.experts_per_token
    numbers = drawn[:, 0].tolist()

    def measure(text: int) -> TextValues:
        tokens = torch.tensor(texts[text], dtype=torch.long, device="cpu")
        (position,) = drawn[drawn[:, 0] == text, 1].tolist()
        routed = expert_observations(model, tokens[None], layers)  # no hooks, which texts side by side would share
        removals = []
        for layer, indices in zip(routed.layers, routed.expert_index, strict=True):
            active = indices[0, position].tolist()  # by falling weight
            removals += [SequenceRemoval(layer, frozenset(active[:count]), position) for count in range(1, k)]
        losses = sequence_removals(model, tokens, removals)
        return np.stack([losses.baseline, losses.removed - losses.baseline])

    measured = measure_text_by_text(model, numbers, measure, shards, progress)
    per_text = len(layers) * (k - 1)
    baseline, delta = np.concatenate([measured[text] for text in numbers], axis=1)
    columns = {
        "layer": np.tile(np.repeat(layers, k - 1), len(drawn)),
        "text": np.repeat(drawn[:, 0], per_text),
        "position": np.repeat(drawn[:, 1], per_text),
        "removed": np.tile(np.arange(1, k), len(drawn) * len(layers)),
        "baseline_loss": baseline,
        "delta_loss": delta,
    }
    return table_with_schema(RELEASED_PROGRESSIVE, columns)
