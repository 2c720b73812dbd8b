"""What an audit takes, counted from a model's config: operations of matrix products, memory, disk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.engine.requests import WAITING_BYTES
from hooked_moe.counterfactuals.work import (
    UNEMBEDDING,
    block_parameters,
    block_work,
    first_order_work,
    outer_parameters,
    parameters,
    removal_work,
)

CONTEXT = 512
"""Tokens of a window, unless the model's context is shorter: as in the audit."""
BYTES_PER_REMOVAL = 34
"""Of effects.parquet: 60 MB for the 1.77 million removals of tiny-olmoe."""
MOST_ON_A_CPU = 4
"""Documents that are measured side by side on a CPU (`hooked_moe.measurement.shards.MAX_WORKERS`)."""


@dataclass(frozen=True)
class Text:
    """What is measured: documents of equal length."""

    documents: int = 72
    tokens: int = 512


@dataclass(frozen=True)
class Plan:
    """What an audit takes. Work in floating-point operations of matrix products, memory and disk in bytes."""

    cfg: HookedMoEConfig
    text: Text
    layers: list[int]
    clean: float
    """The unchanged texts through all blocks."""
    removals: float
    """Removals through the blocks after theirs."""
    predictions: float
    """Unembedding both."""
    first_order: float
    weights: int
    beside: int
    """Memory beside the weights: removals in flight, activations of one block, logits."""
    streamed_weights: int
    """With --stream: the two largest neighbouring blocks, for one is read ahead, and what is outside of blocks."""

    @property
    def work(self) -> float:
        return self.clean + self.removals + self.predictions + self.first_order

    @property
    def n_removals(self) -> int:
        return self.text.documents * self.text.tokens * len(self.layers) * self.cfg.experts_per_token

    @property
    def memory(self) -> int:
        return self.weights + self.beside

    @property
    def streamed_memory(self) -> int:
        return self.streamed_weights + self.beside

    @property
    def disk(self) -> int:
        return self.n_removals * BYTES_PER_REMOVAL


def plan_of(cfg: HookedMoEConfig, text: Text | None = None, layers: list[int] | None = None) -> Plan:
    """Count the audit of a model with this config, in its dtype and on its device, in these layers (None: all with experts)."""
    text = Text() if text is None else text
    layers = list(cfg.moe_layers) if layers is None else layers
    lengths = windows_of(cfg, text.tokens)
    every_block = text.documents * sum(
        sum(block_work(cfg, length, block).values()) for length in lengths for block in range(cfg.n_layers)
    )
    by_window = [removal_work(cfg, length, layers) for length in lengths]
    predictions = text.documents * sum(work[UNEMBEDDING] for work in by_window)
    everything = text.documents * sum(sum(work.values()) for work in by_window)
    return Plan(
        cfg=cfg,
        text=text,
        layers=layers,
        clean=every_block,
        removals=everything - predictions - every_block,
        predictions=predictions,
        first_order=text.documents * sum(first_order_work(cfg, length) for length in lengths),
        weights=parameters(cfg) * cfg.dtype.itemsize,
        beside=memory_beside_weights(cfg, max(lengths), len(layers), text.documents),
        streamed_weights=(largest_neighbours(cfg) + outer_parameters(cfg)) * cfg.dtype.itemsize,
    )


def windows_of(cfg: HookedMoEConfig, tokens: int) -> list[int]:
    """How long the windows of a document are."""
    window = min(cfg.n_ctx, CONTEXT)
    whole, rest = divmod(tokens, window)
    return [window] * whole + [rest] * (rest > 0)


def memory_beside_weights(cfg: HookedMoEConfig, length: int, n_layers: int, documents: int) -> int:
    """Bytes of all documents that are measured side by side: one on a GPU, one for each thread up to four on a CPU."""
    demand = demand_of(cfg, length)
    in_flight = length * n_layers * cfg.experts_per_token * demand.variant_token
    side_by_side = min(documents, MOST_ON_A_CPU, torch.get_num_threads()) if cfg.device.type == "cpu" else 1
    return side_by_side * (demand.fixed + demand.row + min(in_flight, WAITING_BYTES))


def largest_neighbours(cfg: HookedMoEConfig) -> int:
    """Parameters of the two blocks in a row that have most."""
    blocks = [block_parameters(cfg, layer) for layer in range(cfg.n_layers)]
    return max((a + b for a, b in pairwise(blocks)), default=blocks[0])
