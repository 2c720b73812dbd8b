"""The texts that the released code reads, the rows that they become, and its metrics of the experts over these rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from hooked_moe.corpus import Corpus
from hooked_moe.paper.metrics import ExpertValues, released_criteria
from hooked_moe.paper.padded_rows import LayerRows, PaddedTexts, observe_rows
from hooked_moe.paper.protocols import Released, TextRule
from hooked_moe.paper.published import METRICS
from hooked_moe.tables import RELEASED_EXPERTS
from hooked_moe.transformer import Transformer


def selected_texts(rule: TextRule, corpus: Corpus) -> list[str]:
    """The paragraphs of the corpus that a rule reads."""
    return rule.select(document.text for document in corpus.documents)


def encode_text(model: Transformer, text: str, max_tokens: int, special_tokens: bool = True) -> list[int]:
    """Token ids as the checkpoint's tokenizer gives them, cut to `max_tokens` and to the model's context."""
    ids = model.require_tokenizer().encode(text, None if special_tokens else False)
    return ids[: min(max_tokens, model.cfg.n_ctx)]


class AuditTexts:
    """The texts of a run's audit and control. Tokens, rows and metrics are computed when they are first asked for."""

    def __init__(self, model: Transformer, corpus: Corpus, released: Released, layers: Sequence[int], progress: bool) -> None:
        self.model = model
        self.released = released
        self.layers = layers
        self._corpus = corpus
        self._progress = progress

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The token ids of each text."""
        rule = self.released.texts
        return [encode_text(self.model, text, rule.tokens) for text in selected_texts(rule, self._corpus)]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each text has."""
        return [len(text) for text in self.tokens]

    @cached_property
    def padded(self) -> PaddedTexts:
        return PaddedTexts.of(self.tokens, self.model.require_tokenizer().pad_id, self.released.padding or "right")

    @cached_property
    def rows(self) -> dict[int, LayerRows]:
        """What the experts of each layer did at every row."""
        return observe_rows(self.model, self.padded, self.layers, self._progress)

    def row_position(self, text: int, position: int) -> int:
        """Where a token of a text stands in its padded row."""
        left = self.padded.padding == "left"
        return position + (self.padded.tokens.shape[1] - len(self.tokens[text]) if left else 0)

    def weight_range(self, layer: int, text: int, position: int) -> float:
        """The highest routing weight at a token minus the lowest."""
        weights = self.rows[layer].routing_weight[text, self.row_position(text, position)]
        return float(weights[0] - weights[-1])

    @cached_property
    def criteria(self) -> dict[int, dict[str, ExpertValues]]:
        """The released metrics of each layer's experts."""
        return {layer: released_criteria(rows, self.released) for layer, rows in self.rows.items()}

    def experts_table(self) -> pa.Table:
        """The metrics of every expert, as in `tables.RELEASED_EXPERTS`."""
        tables = []
        for layer, criteria in self.criteria.items():
            n = len(criteria[METRICS[0]])
            tables.append(pa.table({"layer": np.full(n, layer), "expert": np.arange(n), **criteria}).cast(RELEASED_EXPERTS))
        return pa.concat_tables(tables)
