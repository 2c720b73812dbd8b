"""An audit of one of many models: every question of `hooked-moe audit` and one pruning, on few tokens of every document.

Studies ask it of each model, and compare what `hooked_moe.analysis.responses` reads off its tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hooked_moe.analysis.cells import sample_positions
from hooked_moe.analysis.pruning_orders import PruningOrders, random_ranking
from hooked_moe.analysis.pruning_table import PRUNING, MeasuredLosses, pruning_table
from hooked_moe.analysis.run import analyse_run
from hooked_moe.analysis.summed_effects import SUMS_FILE
from hooked_moe.cli.options import SEED, first_documents
from hooked_moe.corpus import load_corpus
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.document_losses import document_losses, predicted_tokens
from hooked_moe.measurement.pruned_losses import PrunedLosses
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import ROUTED_PARTS, Ledger, table_with_schema, write_csv_atomic
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
    learned from the even documents, measured on the odd ones; empty for a streamed model) and routed_parts.csv. Raises what
    `open_measurement` raises.
    """
    corpus = first_documents(load_corpus(form.corpus), form.documents)
    tokenized = TokenizedCorpus(model, corpus, min(model.cfg.n_ctx, 512), form.tokens)
    with open_measurement(model, tokenized, form.layers, results=results, name=name) as run:
        settings = dataclasses.asdict(form)
        if Ledger(run.directory, run.known_files()).fault(_REDUCED, _INPUTS, settings) is not None:
            _measure(run, form)
            Ledger(run.directory).record(_REDUCED, _INPUTS, ["routed_parts.csv", "pruning.csv"], settings=settings)
        return run.directory


_REDUCED = "reduced audit"
_INPUTS = ("effects.parquet", "routing.parquet", "expert_weights.parquet", "progressive.parquet", "savings.csv", SUMS_FILE)
"""What the tables beside the analysis are learned from, or are compared with."""


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
    pruned = PRUNING.empty_table() if run.model.streams else _prunings(run, form)  # pruning takes all weights in memory
    write_csv_atomic(pruned, run.directory / "pruning.csv")


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


def routed_parts(model: Transformer, tokenized: TokenizedCorpus, layers: Sequence[int]) -> pa.Table:
    """What all routed experts of a layer are worth together: the loss of every document intact, and without them everywhere.

    A row per layer and document, as in `ROUTED_PARTS`.
    """
    n, intact = predicted_tokens(tokenized), document_losses(model, tokenized)
    removed = []
    for layer in layers:
        nothing = torch.zeros(model.cfg.experts_in(layer), dtype=torch.bool, device="cpu")
        removed.append(document_losses(model, tokenized, ExpertMask({layer: nothing})))
    columns = {
        "document": np.tile(np.arange(len(n)), len(layers)),
        "layer": np.repeat(np.array(layers), len(n)),
        "n_positions": np.tile(n, len(layers)),
        "intact_loss": np.tile(intact, len(layers)),
        "removed_loss": np.concatenate(removed),
    }
    return table_with_schema(ROUTED_PARTS, columns)
