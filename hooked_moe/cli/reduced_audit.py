"""An audit of one of many models: every question of `hooked-moe audit` and one pruning, on few tokens of every document.

Studies ask it of each model, and compare what `hooked_moe.analysis.responses` reads off its tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hooked_moe.analysis.cells import sample_positions
from hooked_moe.analysis.pruning_orders import PruningOrders, random_ranking
from hooked_moe.analysis.pruning_table import MeasuredLosses, pruning_table
from hooked_moe.analysis.responses import ROUTED_PARTS
from hooked_moe.analysis.run import analyse_run
from hooked_moe.cli.options import SEED, first_documents
from hooked_moe.corpus import load_corpus
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.pruned_losses import TOKENS_PER_BATCH, PrunedLosses
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import table_with_schema, write_csv_atomic
from hooked_moe.transformer import Transformer

REFERENCE = "reap"


@dataclass(frozen=True)
class AuditForm:
    """How much of an audit is made. The fewer tokens, the faster; documents are what intervals are over."""

    layers: tuple[int, ...] | None = None
    """None: all that have experts."""
    corpus: str = "held-out"
    documents: int | None = None
    """The first so many; None: all."""
    tokens: int = 64
    """Of each document."""
    progressive_positions: int = 360
    pruned_share: float = 0.25
    random_prunings: int = 5


def reduced_audit(model: Transformer, form: AuditForm, results: Path, name: str) -> Path:
    """Measure and analyse a model, unless that has been done; returns the run's directory.

    Beside the tables of `hooked-moe audit` there are progressive.csv (in random order), pruning.csv (REAP and random masks,
    learned from the even documents, measured on the odd ones) and routed_parts.csv. Raises what `open_measurement` raises.
    """
    corpus = first_documents(load_corpus(form.corpus), form.documents)
    tokenized = TokenizedCorpus(model, corpus, min(model.cfg.n_ctx, 512), form.tokens)
    with open_measurement(model, tokenized, form.layers, results=results, name=name) as run:
        if not (run.directory / "pruning.csv").is_file():  # the last to be written
            _measure(run, form)
        return run.directory


def _measure(run: Run, form: AuditForm) -> None:
    run.require("position", progress=False)
    valid = run.tokenized.valid_positions()
    n = min(form.progressive_positions, len(valid))
    sample = frozenset(valid[index] for index in sample_positions(len(valid), n, SEED))
    run.require("progressive", sample, orders=["random"], progress=False)
    analyse_run(
        run.directory, n_experts=run.model.cfg.num_experts, layers=run.layers, n_positions=min(200, len(valid)), seed=SEED
    )
    write_csv_atomic(routed_parts(run.model, run.tokenized, run.layers), run.directory / "routed_parts.csv")
    write_csv_atomic(_prunings(run, form), run.directory / "pruning.csv")


def _prunings(run: Run, form: AuditForm) -> pa.Table:
    orders = PruningOrders(run.directory, run.model.cfg.num_experts, "even")
    names = (REFERENCE, *map(random_ranking, range(form.random_prunings)))
    prunings = [orders.prune(name, form.pruned_share, "layer") for name in names]
    odd = range(1, len(run.tokenized.documents), 2)
    losses = PrunedLosses(run.model, run.tokenized, odd, form.tokens, run.directory / "prunings", run.plan)
    intact = losses.of({})
    pruned = np.stack([losses.of(pruning.experts).total for pruning in prunings])
    measured = MeasuredLosses(intact.n_positions, intact.total, pruned, form.tokens)
    return pruning_table(prunings, measured, orders.sums, "even")


@torch.inference_mode()
def routed_parts(model: Transformer, tokenized: TokenizedCorpus, layers: Sequence[int]) -> pa.Table:
    """What all routed experts of a layer are worth together: the loss of every document intact, and without them everywhere.

    A row per document and layer, as in `ROUTED_PARTS`.
    """
    n = [sum(len(window.tokens) - 1 - tokenized.first for window in windows) for windows in tokenized.documents]
    intact = _document_losses(model, tokenized, None)
    columns: Mapping[str, list[float]] = {name: [] for name in ROUTED_PARTS.names}
    for layer in layers:
        mask = ExpertMask({layer: torch.zeros(model.cfg.experts_in(layer), dtype=torch.bool)})
        removed = _document_losses(model, tokenized, mask)
        for document, positions in enumerate(n):
            row = (document, layer, positions, intact[document], removed[document])
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value)
    return table_with_schema(ROUTED_PARTS, columns)


def _document_losses(model: Transformer, tokenized: TokenizedCorpus, mask: ExpertMask | None) -> np.ndarray:
    """Nats, summed over each document's tokens."""
    total = np.zeros(len(tokenized.documents))
    windows = sorted((window for windows in tokenized.documents for window in windows), key=lambda window: len(window.tokens))
    for length, group in groupby(windows, key=lambda window: len(window.tokens)):
        alike = list(group)
        rows = max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(alike), rows):
            batch = alike[start : start + rows]
            tokens = torch.from_numpy(np.stack([window.tokens for window in batch])).to(model.cfg.device)
            losses = model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)[:, tokenized.first :]
            for window, loss in zip(batch, losses.double().sum(dim=1).tolist(), strict=True):
                total[window.document] += loss
    return total
