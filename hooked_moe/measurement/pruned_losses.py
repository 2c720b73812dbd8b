"""The loss of each document without some experts, removed for good: what a pruning costs, measured.

Every set of experts is measured once on the documents of an evaluation and kept under the name of what was asked, so that a
measurement that was killed resumes, and experts that two rankings choose alike are measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from hooked_moe.checks import by_number, whole_numbers
from hooked_moe.components.precision import without_autocast
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.shards import missing_units
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.surgery import without_experts
from hooked_moe.tables import digest
from hooked_moe.transformer import Transformer

TOKENS_PER_BATCH = 1024
"""Bounds the logits: as many tokens at a time times the vocabulary."""
_TABLE = "losses"


@dataclass(frozen=True)
class DocumentLosses:
    n_positions: Int[np.ndarray, " document"]  # tokens that were predicted
    total: Float[np.ndarray, " document"]  # nats


class PrunedLosses:
    """Losses of a corpus's documents under one model and any of its prunings."""

    def __init__(
        self,
        model: Transformer,
        tokenized: TokenizedCorpus,
        documents: Iterable[int],
        tokens_per_document: int,
        directory: Path,
        plan: dict[str, Any],
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        """The first `tokens_per_document` tokens of each document are read. `plan` says what model and corpus these are; `log` is
        told of damaged files.
        """
        self._log = log
        self.model, self.documents, self.directory = model, whole_numbers(documents, "documents"), directory
        self._asked = {"plan": digest(plan), "documents": self.documents, "tokens": tokens_per_document}
        self._windows: list[tuple[int, np.ndarray]] = []  # (number of the document, tokens), by length
        for number, document in enumerate(self.documents):
            for window in tokenized.documents[document]:
                kept = window.tokens[: max(0, tokens_per_document - window.start) + tokenized.first]
                if len(kept) >= tokenized.first + 2:
                    self._windows.append((number, kept))
        self._windows.sort(key=lambda window: len(window[1]))
        self._first = tokenized.first

    def of(self, experts: Mapping[int, Iterable[int]]) -> DocumentLosses:
        """Without these experts, {layer: experts}; an empty mapping means the intact model. Measured, unless it has been."""
        named = {layer: whole_numbers(removed, "experts") for layer, removed in by_number(experts, "layer").items()}
        identity = self._asked | {"experts": {str(layer): sorted(removed) for layer, removed in sorted(named.items())}}
        unit = digest(identity)[:16]
        files = ShardFiles(self.directory, identity, [_TABLE], self._log)
        for _ in missing_units(files, [unit]):
            with without_experts(self.model, named):
                losses = self._measured()
            columns = {"document": self.documents, "n_positions": losses.n_positions, "loss": losses.total}
            files.write(unit, {_TABLE: pa.table(columns)})
        table = files.read(unit, _TABLE)
        return DocumentLosses(table["n_positions"].to_numpy(), table["loss"].to_numpy())

    @without_autocast()
    def _measured(self) -> DocumentLosses:
        n, total = np.zeros(len(self.documents), np.int64), np.zeros(len(self.documents))
        for length, group in groupby(self._windows, key=lambda window: len(window[1])):
            windows = list(group)
            rows = max(1, TOKENS_PER_BATCH // length)
            for start in range(0, len(windows), rows):
                batch = windows[start : start + rows]
                tokens = torch.from_numpy(np.stack([tokens for _, tokens in batch])).to(self.model.cfg.device)
                with torch.inference_mode():
                    losses = self.model(tokens, return_type="loss", loss_per_token=True)[:, self._first :].double().sum(dim=1)
                for (number, tokens_), loss in zip(batch, losses.tolist(), strict=True):
                    n[number] += len(tokens_) - 1 - self._first
                    total[number] += loss
        return DocumentLosses(n, total)
