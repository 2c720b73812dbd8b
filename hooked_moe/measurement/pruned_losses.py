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
from hooked_moe.executors import Executor, ModelWork, Threads
from hooked_moe.loading.fingerprint import SameModel
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.shards import missing_units
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.progress import progress_bar
from hooked_moe.surgery import without_experts
from hooked_moe.tables import digest
from hooked_moe.transformer import Transformer

TOKENS_PER_BATCH = 1024
"""Bounds the logits: as many tokens at a time times the vocabulary."""
_TABLE = "losses"


Experts = tuple[tuple[int, tuple[int, ...]], ...]
"""What is removed: ((layer, experts), ...), in order; empty for the intact model."""


@dataclass(frozen=True)
class DocumentLosses:
    n_positions: Int[np.ndarray, " document"]  # tokens that were predicted
    total: Float[np.ndarray, " document"]  # nats


@dataclass(frozen=True)
class MeasurePrunings:
    """What is measured of every pruning, and where it is kept: a task for executors, whose units are sets of experts."""

    directory: Path
    asked: dict[str, Any]
    """What model, corpus, documents and tokens these are."""
    documents: list[int]
    windows: list[tuple[int, np.ndarray]]
    """(number of the document, tokens), by length."""
    first: int
    """Where a window's own tokens begin."""

    def do(self, resource: Transformer, unit: Experts) -> None:
        """Measure the losses without these experts, and write them, unless a worker has that died before it could say so."""
        if self.files(unit).is_whole(self.name(unit)):
            return
        with without_experts(resource, dict(unit)):
            losses = self._measured(resource)
        columns = {"document": self.documents, "n_positions": losses.n_positions, "loss": losses.total}
        self.files(unit).write(self.name(unit), {_TABLE: pa.table(columns)})

    def name(self, unit: Experts) -> str:
        """What the files of a unit are called."""
        return digest(self._identity(unit))[:16]

    def files(self, unit: Experts, log: Callable[[str], object] = lambda line: None) -> ShardFiles:
        """The files of a unit."""
        return ShardFiles(self.directory, self._identity(unit), [_TABLE], log)

    def _identity(self, unit: Experts) -> dict[str, Any]:
        return self.asked | {"experts": {str(layer): list(experts) for layer, experts in unit}}

    @without_autocast()
    def _measured(self, model: Transformer) -> DocumentLosses:
        n, total = np.zeros(len(self.documents), np.int64), np.zeros(len(self.documents))
        for length, group in groupby(self.windows, key=lambda window: len(window[1])):
            windows = list(group)
            rows = max(1, TOKENS_PER_BATCH // length)
            for start in range(0, len(windows), rows):
                batch = windows[start : start + rows]
                tokens = torch.from_numpy(np.stack([tokens for _, tokens in batch])).to(model.cfg.device)
                with torch.inference_mode():
                    losses = model(tokens, return_type="loss", loss_per_token=True)[:, self.first :].double().sum(dim=1)
                for (number, tokens_), loss in zip(batch, losses.tolist(), strict=True):
                    n[number] += len(tokens_) - 1 - self.first
                    total[number] += loss
        return DocumentLosses(n, total)


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
        self.documents = whole_numbers(documents, "documents")
        asked = {"plan": digest(plan), "documents": self.documents, "tokens": tokens_per_document}
        windows: list[tuple[int, np.ndarray]] = []
        for number, document in enumerate(self.documents):
            for window in tokenized.documents[document]:
                kept = window.tokens[: max(0, tokens_per_document - window.start) + tokenized.first]
                if len(kept) >= tokenized.first + 2:
                    windows.append((number, kept))
        windows.sort(key=lambda window: len(window[1]))
        self._task = MeasurePrunings(directory.resolve(), asked, self.documents, windows, tokenized.first)
        self._work: ModelWork[Experts] = ModelWork(model, self._task, 1, SameModel(plan))

    def measure(
        self, prunings: Iterable[Mapping[int, Iterable[int]]], executor: Executor | None = None, progress: bool = False
    ) -> None:
        """Measure without each of these sets of experts, {layer: experts}, unless that has been done; each is kept as it is."""
        units = list(dict.fromkeys(map(_unit, prunings)))
        pending = [unit for unit in units if not self._is_whole(unit)]
        with progress_bar(len(units), "pruned models", "model", shown=progress, done=len(units) - len(pending)) as bar:
            for _ in (executor or Threads()).run(self._work, pending):
                bar.update()

    def of(self, experts: Mapping[int, Iterable[int]]) -> DocumentLosses:
        """Without these experts, {layer: experts}; an empty mapping means the intact model. Measured, unless it has been."""
        unit = _unit(experts)
        files, name = self._task.files(unit, self._log), self._task.name(unit)
        for _ in missing_units(files, [name]):
            self._work.do(unit)
        table = files.read(name, _TABLE)
        return DocumentLosses(table["n_positions"].to_numpy(), table["loss"].to_numpy())

    def _is_whole(self, unit: Experts) -> bool:
        return self._task.files(unit, self._log).is_whole(self._task.name(unit))


def _unit(experts: Mapping[int, Iterable[int]]) -> Experts:
    named = {layer: whole_numbers(removed, "experts") for layer, removed in by_number(experts, "layer").items()}
    return tuple((layer, tuple(sorted(removed))) for layer, removed in sorted(named.items()))
