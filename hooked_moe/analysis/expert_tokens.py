"""The tokens that show what an expert does: those where its removal changes most, and how much of its effect lies on each.

Two passes: the first finds the removals with the largest effects of every expert, the second sums, for the tokens at which these
occur, all effects of the expert on that token. Memory grows with experts, not with the corpus.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.analysis.accumulators.top_entries import Scored, TopHeap
from hooked_moe.tables import schema_of, table_with_schema
from hooked_moe.tables.effect_grid import EffectGrid

MOST_TOKENS = 24
"""Removals kept of each expert and effect."""
_POSITIONS_AT_ONCE = 2048

_LAYER = ("layer", pa.int16(), "index", "transformer block, counted from 0")
_EXPERT = ("expert", pa.int16(), "index", "routed expert, counted from 0")
_TOKEN = ("token", pa.int32(), "token id", "the token at which the expert is removed")
EXPERT_TOKENS = schema_of(
    _LAYER,
    _EXPERT,
    ("effect", pa.string(), "name", "delta_loss, the realised effect, or kl, the expected one"),
    ("rank", pa.int16(), "rank", "among the removals of the expert by |value|; 0 is the largest"),
    ("document", pa.int32(), "index", "document of the corpus, counted from 0"),
    ("position", pa.int32(), "index", "token position inside the document, counted from 0"),
    ("value", pa.float32(), "nats", "the effect of this removal"),
)
TOKEN_SHARES = schema_of(
    _LAYER,
    _EXPERT,
    _TOKEN,
    ("n_removals", pa.int64(), "removals", "measured removals of the expert at this token"),
    ("n_documents", pa.int32(), "documents", "documents in which they are"),
    ("sum_kl", pa.float64(), "nats", "expected effect, summed over them"),
    ("share_of_removals", pa.float64(), "1", "n_removals as a share of all measured removals of the expert"),
    ("share_of_effect", pa.float64(), "1", "sum_kl as a share of the expert's expected effect over all its removals"),
)


class TopEffects:
    """The removals with the largest realised and expected effects of every expert: the first pass."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._harms, self._helps, self._kl = TopHeap(MOST_TOKENS), TopHeap(MOST_TOKENS, lowest=True), TopHeap(MOST_TOKENS)

    def update(self, measured: EffectGrid) -> None:
        """Add a chunk's measured positions, a few at a time: what cannot be among the largest is left out sooner."""
        for start in range(0, len(measured.document), _POSITIONS_AT_ONCE):
            rows = slice(start, start + _POSITIONS_AT_ONCE)
            for heap, values in ((self._harms, measured.delta_loss), (self._helps, measured.delta_loss), (self._kl, measured.kl)):
                if values is not None:
                    heap.add(
                        Scored(self.layers, measured.document[rows], measured.position[rows], measured.expert[rows], values[rows])
                    )

    def table(self) -> pa.Table:
        """As in EXPERT_TOKENS, by layer, expert, effect and rank."""
        parts = [*_ranked("delta_loss", (self._harms, self._helps)), *_ranked("kl", (self._kl,))]
        table = pa.concat_tables([EXPERT_TOKENS.empty_table(), *parts])
        return table.sort_by([(name, "ascending") for name in ("layer", "expert", "effect", "rank")])

    def tokens(self, path: Path) -> Int[np.ndarray, "3 entry"]:
        """Layers, experts and tokens of the largest expected effects, each once; `path` is tokens.parquet."""
        own = self._kl.entries
        places, entry = np.unique(_place(own["document"], own["position"]), return_inverse=True)
        token = np.full(len(places), -1, np.int64)
        for rows in row_batches(path, ("document", "position", "token")):
            place = _place(rows["document"], rows["position"])
            kept = np.isin(place, places)
            token[np.searchsorted(places, place[kept])] = rows["token"][kept]
        return np.unique(np.stack([own["layer"], own["expert"], token[entry]]), axis=1)


def _ranked(effect: str, heaps: Sequence[TopHeap]) -> Iterator[pa.Table]:
    """The entries of one or two heaps of signed values, by falling size."""
    own = {name: np.concatenate([heap.entries[name] for heap in heaps]) for name in heaps[0].entries}
    value = np.concatenate([heap.sign * heap.value for heap in heaps])
    twice = np.stack([*own.values()])
    _, first = np.unique(twice, axis=1, return_index=True)  # an expert with few removals has some of them in both heaps
    own, value = {name: values[first] for name, values in own.items()}, value[first]
    order = np.lexsort((own["position"], own["document"], -np.abs(value), own["expert"], own["layer"]))
    own, value = {name: values[order] for name, values in own.items()}, value[order]
    if not len(value):
        return
    starts = np.flatnonzero(np.diff(own["layer"], prepend=-1) | np.diff(own["expert"], prepend=-1))
    rank = np.arange(len(value)) - np.repeat(starts, np.diff(np.append(starts, len(value))))
    kept = rank < MOST_TOKENS
    columns = own | {"rank": rank, "value": value}
    yield table_with_schema(
        EXPERT_TOKENS, {name: values[kept] for name, values in columns.items()} | {"effect": [effect] * int(kept.sum())}
    )


def _place(document: Int[np.ndarray, " row"], position: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    return document.astype(np.int64) << 32 | position


class TokenShares:
    """How much of each expert's expected effect lies on the tokens of its largest effects: the second pass."""

    def __init__(self, tokens: Int[np.ndarray, "3 entry"], sums: ExpertEffectSums) -> None:
        """`tokens` are layers, experts and tokens, as `TopEffects.tokens` finds them."""
        self._sums = sums
        layer, expert, token = tokens
        self._n_tokens = int(token.max(initial=0)) + 1
        axis = np.searchsorted(sums.layers, layer)  # they rise
        self._keys = np.unique((axis * sums.n_experts + expert) * self._n_tokens + token)
        self._count, self._documents = (np.zeros(len(self._keys), np.int64) for _ in range(2))
        self._total = np.zeros(len(self._keys))
        self._last_document = np.full(len(self._keys), -1)

    def update(self, measured: EffectGrid, token: Int[np.ndarray, " P"]) -> None:
        """Add a chunk's measured positions, and the token at each."""
        if measured.kl is None or not len(self._keys) or not len(token):
            return
        axes = np.arange(len(measured.layers))[:, None]
        known = (token < self._n_tokens)[:, None, None]
        key = np.where(known, (axes * self._sums.n_experts + measured.expert) * self._n_tokens + token[:, None, None], -1)
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        hit = self._keys[place] == key
        place, kl = place[hit], measured.kl[hit]
        document = np.broadcast_to(measured.document[:, None, None], hit.shape)[hit].astype(np.int64)
        self._count += np.bincount(place, minlength=len(self._keys))
        self._total += np.bincount(place, kl, len(self._keys))
        self._count_documents(place, document)

    def _count_documents(self, place: Int[np.ndarray, " hit"], document: Int[np.ndarray, " hit"]) -> None:
        """Documents come in order, so one that was counted before can only be the last."""
        pairs = np.unique(np.stack([place, document]), axis=1)
        new = self._last_document[pairs[0]] != pairs[1]
        self._documents += np.bincount(pairs[0][new], minlength=len(self._keys))
        self._last_document[pairs[0]] = pairs[1]  # the last assignment of each place counts, and that is its last document

    def table(self) -> pa.Table:
        """As in TOKEN_SHARES, by layer, expert and falling share."""
        expert_key, token = self._keys // self._n_tokens, self._keys % self._n_tokens
        removals: Float[np.ndarray, " expert"] = self._sums.counts().sum(axis=0).ravel()
        effect: Float[np.ndarray, " expert"] = self._sums.sums("kl").sum(axis=0).ravel()
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self._total / effect[expert_key]
        order = np.lexsort((token, -share, expert_key))
        columns = {
            "layer": np.asarray(self._sums.layers)[expert_key // self._sums.n_experts],
            "expert": expert_key % self._sums.n_experts,
            "token": token,
            "n_removals": self._count,
            "n_documents": self._documents,
            "sum_kl": self._total,
            "share_of_removals": self._count / removals[expert_key],
            "share_of_effect": share,
        }
        return table_with_schema(TOKEN_SHARES, {name: values[order] for name, values in columns.items()})
