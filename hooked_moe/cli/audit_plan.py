"""What an audit takes, counted from a model's config: operations of matrix products, memory, disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.engine.requests import WAITING_BYTES
from hooked_moe.counterfactuals.work import (
    ATTENTION,
    UNEMBEDDING,
    block_parameters,
    block_work,
    expert_parameters,
    first_order_work,
    outer_parameters,
    removal_work,
)
from hooked_moe.measurement.budget import FEWEST_REMOVALS, Budget, share_within

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


class Removals(NamedTuple):
    """Operations of removals, which grow with their number."""

    blocks: float
    """Through the blocks after theirs."""
    attention: float
    """Of that, attention to earlier positions, which is in float32 whatever products are in."""
    predictions: float
    """Unembedding them."""

    def times(self, share: float) -> Removals:
        return Removals(*(share * work for work in self))

    @property
    def work(self) -> float:
        return self.blocks + self.predictions


@dataclass(frozen=True)
class Plan:
    """What an audit takes. Work in floating-point operations of matrix products, memory and disk in bytes."""

    cfg: HookedMoEConfig
    text: Text
    layers: list[int]
    products: torch.dtype | None
    """Of the change that a removal makes; None: as all others."""
    clean: float
    """The unchanged texts through all blocks."""
    clean_predictions: float
    """Unembedding them."""
    removals: Removals
    first_order: float
    weights: int
    beside: int
    """Memory beside the weights: removals in flight, activations of one block, logits."""
    streamed_weights: int
    """With --stream: the two largest neighbouring blocks, for one is read ahead, and what is outside of blocks."""
    share: float = 1.0
    """Of all removals, those that are made; less than 1 with a budget."""

    @property
    def work(self) -> float:
        return self.clean + self.clean_predictions + self.removals.work + self.first_order

    @property
    def narrow_work(self) -> float:
        """Of the work, what is in the dtype of `products`."""
        return 0.0 if self.products is None else self.removals.work - self.removals.attention

    @property
    def all_removals(self) -> int:
        """How many there are."""
        return self.text.documents * self.text.tokens * len(self.layers) * self.cfg.experts_per_token

    @property
    def n_removals(self) -> int:
        """How many are made."""
        return round(self.share * self.all_removals)

    def with_share(self, share: float) -> Plan:
        """The plan of a budget, from that of all removals. Those that are not made are estimated."""
        return replace(self, share=share, removals=self.removals.times(share))

    @property
    def memory(self) -> int:
        return self.weights + self.beside

    @property
    def streamed_memory(self) -> int:
        return self.streamed_weights + self.beside

    @property
    def disk(self) -> int:
        """A budget's tables have the estimates of all removals."""
        return self.all_removals * BYTES_PER_REMOVAL


def plan_of(
    cfg: HookedMoEConfig, text: Text | None = None, layers: list[int] | None = None, products: torch.dtype | None = None
) -> Plan:
    """Count the audit of a model with this config, in its dtype and on its device, in these layers (None: all with experts)."""
    text = Text() if text is None else text
    layers = list(cfg.moe_layers) if layers is None else layers
    lengths = windows_of(cfg, text.tokens)
    all_runs, clean_run = (
        _summed([removal_work(cfg, length, removed) for length in lengths], text.documents) for removed in (layers, [])
    )
    blocks = text.documents * sum(
        sum(block_work(cfg, length, block).values()) for length in lengths for block in range(cfg.n_layers)
    )
    predictions, clean_predictions = all_runs.pop(UNEMBEDDING), clean_run.pop(UNEMBEDDING)
    return Plan(
        cfg=cfg,
        text=text,
        layers=layers,
        products=products,
        clean=blocks,
        clean_predictions=clean_predictions,
        removals=Removals(
            blocks=sum(all_runs.values()) - blocks,
            attention=all_runs[ATTENTION] - clean_run[ATTENTION],
            predictions=predictions - clean_predictions,
        ),
        first_order=text.documents * sum(first_order_work(cfg, length) for length in lengths),
        weights=bytes_of(cfg, range(cfg.n_layers)),
        beside=memory_beside_weights(cfg, max(lengths), len(layers), text.documents, products),
        streamed_weights=max(bytes_of(cfg, blocks) for blocks in neighbours(cfg)),
    )


def affordable(plan: Plan, budget: Budget, seconds: Callable[[Plan], float]) -> Plan:
    """The plan of what a budget pays for: a share of the removals, or the share that a time is enough for, of which estimates
    are no part. Raises `ValueError` where the time is too short."""
    if budget.share is not None:
        return plan.with_share(budget.share)
    assert budget.seconds is not None
    measuring = replace(plan, first_order=0.0)
    texts = seconds(measuring.with_share(0.0))
    share = share_within(budget.seconds, texts, (seconds(measuring) - texts) / plan.n_removals, plan.n_removals)
    if share is None:
        raise ValueError(
            f"{budget.seconds:g} s are too few for {FEWEST_REMOVALS} removals: the products of the texts alone take "
            f"{texts:.3g} s; give more time, or fewer documents"
        )
    return plan.with_share(share)


def _summed(work: list[dict[str, float]], times: int) -> dict[str, float]:
    return {phase: times * sum(one[phase] for one in work) for phase in work[0]}


def windows_of(cfg: HookedMoEConfig, tokens: int) -> list[int]:
    """How long the windows of a document are."""
    window = min(cfg.n_ctx, CONTEXT)
    whole, rest = divmod(tokens, window)
    return [window] * whole + [rest] * (rest > 0)


def memory_beside_weights(
    cfg: HookedMoEConfig, length: int, n_layers: int, documents: int, products: torch.dtype | None = None
) -> int:
    """Bytes of all documents that are measured side by side: one on a GPU, one for each thread up to four on a CPU."""
    demand = demand_of(cfg, length, products=products)
    in_flight = length * n_layers * cfg.experts_per_token * demand.variant_token
    side_by_side = min(documents, MOST_ON_A_CPU, torch.get_num_threads()) if cfg.device.type == "cpu" else 1
    return side_by_side * (demand.fixed + demand.row + min(in_flight, WAITING_BYTES))


def bytes_of(cfg: HookedMoEConfig, blocks: Sequence[int]) -> int:
    """The weights of these blocks and of what is outside of blocks. The routed experts may be stored in a narrower dtype."""
    spared = 0 if cfg.store is None else cfg.dtype.itemsize - cfg.store.itemsize
    inside = sum(block_parameters(cfg, block) * cfg.dtype.itemsize - expert_parameters(cfg, block) * spared for block in blocks)
    return inside + outer_parameters(cfg) * cfg.dtype.itemsize


def neighbours(cfg: HookedMoEConfig) -> list[tuple[int, ...]]:
    """Blocks that are there at a time where they are streamed: two in a row."""
    return list(pairwise(range(cfg.n_layers))) or [(0,)]
