"""How much memory counterfactuals take, and how to stay within a budget.

Counted are tensors. A CPU with matrix units for half precision keeps the kernels that oneDNN compiles for it beside them, at most
1,024 of them: about 0.6 GB in bfloat16, however much is measured. ONEDNN_PRIMITIVE_CACHE_CAPACITY=256 keeps fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hooked_moe.checks import as_int_or_none, quoted
from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.work import block_parameters
from hooked_moe.kernels.target_loss import chunk_bytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(amount: int | str) -> int:
    """A number of bytes, or text such as "4GB" (10^9) or "512MiB" (2^20). Raises `ValueError` for anything else."""
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", amount)
        if match and match[2].upper() in _UNITS and len(match[1]) < 30:
            amount = int(float(match[1]) * _UNITS[match[2].upper()])
    nbytes = as_int_or_none(amount)
    if nbytes is None or not 1 <= nbytes < 2**63:
        shown = "a number of more than 63 bits" if nbytes is not None and nbytes >= 2**63 else quoted(amount)
        raise ValueError(f"a memory budget is a number of bytes, or text such as '4GB' or '512MiB', not {shown}")
    return nbytes


@dataclass(frozen=True)
class Demand:
    """Bytes that a fan-out needs beside the model's weights and its results, by what they grow with."""

    fixed: int
    """Whatever is asked: the variants in one block at a time, and logits."""
    row: int
    """For each batch row: one block of the clean run."""
    variant_token: int
    """For each token of each variant: its residual stream."""

    def of_one_query(self, tokens: int) -> int:
        """Bytes for the least that can be asked: one query of `tokens` variant tokens, in one layer and row."""
        return self.fixed + self.row + tokens * self.variant_token


def variant_bytes(cfg: HookedMoEConfig) -> int:
    """Bytes of one variant token."""
    return cfg.d_model * cfg.dtype.itemsize


def demand_of(cfg: HookedMoEConfig, length: int, chunk_size: int | None = None, products: torch.dtype | None = None) -> Demand:
    """An upper estimate, from the largest activations of a block. `chunk_size` tokens of variants go through it together; their
    `products` may be of their change, in a narrower dtype, for which a block's products are kept, and its weights in that."""
    chunk_size = chunk_size_on(cfg.device) if chunk_size is None else chunk_size
    size, wide, on_cpu = cfg.dtype.itemsize, 4, cfg.device.type == "cpu"
    attention = cfg.n_heads * (2 * cfg.d_head + 2 * cfg.value_width) + cfg.n_key_value_heads * (cfg.d_head + cfg.value_width)
    mlp = cfg.d_model + 4 * cfg.d_expert  # of a token in one expert, beside its output; on a CPU, of one expert at a time
    experts = cfg.experts_per_token * cfg.d_model + (1 if on_cpu else cfg.experts_per_token) * mlp
    experts += 3 * ((cfg.d_shared or 0) + cfg.num_experts)
    token = size * (6 * cfg.d_model + attention + max(experts, 3 * (cfg.d_mlp or 0))) + 2 * wide * cfg.d_model
    logit_chunk = max(64 * wide * cfg.d_vocab, chunk_bytes(cfg.device))  # logits of 64 tokens at least
    kinds = 2 if on_cpu else 4  # the clean run's, a change; of a whole chunk, too, their sum and log-softmax
    logits = max(kinds * logit_chunk, 64 << 20)
    widened = wide * cfg.d_vocab * cfg.d_model if size < wide else 0  # the unembedding, in float32 whatever the model is in
    widened += 3 * size * cfg.d_expert * cfg.d_model if cfg.store is not None else 0  # an expert
    kept = copies = 0
    if products is not None:
        kept = token + size * cfg.experts_per_token * 2 * cfg.d_expert  # of every product of a token of the clean run
        largest = max(block_parameters(cfg, layer) for layer in range(cfg.n_layers))
        copies = products.itemsize * max(largest, cfg.d_vocab * cfg.d_model)  # of a block's weights, or of the unembedding
    return Demand(
        fixed=max(chunk_size, length) * (token + kept) + logits + widened + copies,
        row=length * (token + kept),
        variant_token=variant_bytes(cfg),
    )


def demand_within(
    cfg: HookedMoEConfig, length: int, tokens_per_query: int, budget: int, products: torch.dtype | None = None
) -> tuple[Demand, int]:
    """The demand, and how many tokens of variants go through a block together: fewer than go fastest, where a budget has no room
    for one query beside those."""
    chunk_size = chunk_size_on(cfg.device)
    demand = demand_of(cfg, length, chunk_size, products)
    while chunk_size > length and budget < demand.of_one_query(tokens_per_query):
        chunk_size //= 2
        demand = demand_of(cfg, length, chunk_size, products)
    return demand, chunk_size


def divide(
    packed: Packed, layers: Sequence[int], demand: Demand, tokens_per_query: int, budget: int
) -> Iterator[tuple[Packed, list[int]]]:
    """Parts of the work that fit into the budget, each of some batch rows, layers and queries: as few as possible.

    `tokens_per_query` counts the tokens of all variants of one layer and query. Raises `ValueError` if not even one query of one
    layer fits.
    """
    left = budget - demand.fixed - demand.row
    query = tokens_per_query * demand.variant_token
    if left < query:
        raise too_small(budget, packed, demand.of_one_query(tokens_per_query))
    queries = min(packed.queries, left // query)
    layers_per_part = min(len(layers), left // (query * queries)) if queries == packed.queries else 1
    rows = 1
    if layers_per_part == len(layers):
        rows += (left - len(layers) * query * queries) // (demand.row + len(layers) * query * queries)
    for row_part in packed.split(rows):
        for part in row_part.split_queries(queries):
            for start in range(0, len(layers), layers_per_part):
                yield part, list(layers[start : start + layers_per_part])


def too_small(budget: int, packed: Packed, needed: int) -> ValueError:
    """The error of a budget in which not even one query has room."""
    return ValueError(f"memory_budget is {budget:,} bytes, and rows of {packed.tokens.shape[1]} tokens take {needed:,} at least")
