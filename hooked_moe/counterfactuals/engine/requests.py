"""What is asked for, checked once: of which model, at which tokens and layers, with which readouts, in how much memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none, described, whole_numbers
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.counterfactuals.engine.memory import Demand, demand_of, demand_within, divide, parse_bytes, too_small
from hooked_moe.counterfactuals.engine.padding import Packed, pack
from hooked_moe.counterfactuals.engine.readout import Readout, by_name, window_widths
from hooked_moe.loading.spill import Waiting
from hooked_moe.loading.streaming import spill_of
from hooked_moe.transformer import Transformer

WAITING_BYTES = 1 << 30
"""Where no budget is given: bytes of variants in flight, beside what one row of the clean run takes anyway."""

Tokens = Int[Tensor, "batch pos"] | str | list[str]
Mask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]
Layers = Iterable[int]
Positions = Iterable[int] | Bool[Tensor, "batch pos"]
Embeddings = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Request:
    model: Transformer
    layers: list[int]
    packed: Packed
    readouts: dict[str, Readout]
    budget: int | None
    """Bytes beside the model's weights and the results; None: what it takes, and `WAITING_BYTES` for variants."""
    progress: bool = False
    """Whether a bar counts the layers as they are done."""
    products: torch.dtype | None = None
    """The narrower dtype in which variants' products are made of their change; None: they are made as the clean run's."""

    def parts(self, n_variants: int) -> Iterator[tuple[Packed, list[int]]]:
        """Parts of the work that fit into memory: some batch rows, layers and queries each, with windows of one width."""
        for packed in self.packed.split_by_width(window_widths(self.readouts.values(), self.packed)):
            tokens_per_query = n_variants * packed.width
            demand = self._demand(tokens_per_query)[0]
            budget = demand.fixed + demand.row + WAITING_BYTES if self.budget is None else self.budget
            yield from divide(packed, self.layers, demand, tokens_per_query, budget)

    def room_for_picks(self, picks: int) -> tuple[int, int]:
        """How many batch rows with up to `picks` single variants each are measured together, and how many of one row's."""
        demand = self._demand(1)[0]
        budget = demand.fixed + demand.row + WAITING_BYTES if self.budget is None else self.budget
        left = budget - demand.fixed - demand.row
        if left < demand.variant_token:
            raise too_small(budget, self.packed, demand.of_one_query(1))
        rows = 1 + max(0, left - picks * demand.variant_token) // (demand.row + picks * demand.variant_token)
        return rows, left // demand.variant_token

    def chunk_size(self, tokens_per_query: int) -> int:
        """How many tokens of variants go through a block together."""
        return self._demand(tokens_per_query)[1]

    def _demand(self, tokens_per_query: int) -> tuple[Demand, int]:
        cfg, length = self.model.cfg, self.packed.tokens.shape[1]
        if self.budget is None:
            return demand_of(cfg, length, products=self.products), chunk_size_on(cfg.device)
        return demand_within(cfg, length, tokens_per_query, self.budget, self.products)

    @contextmanager
    def waiting_room(self, nbytes: int) -> Iterator[Waiting | None]:
        """Where residual streams wait between layers: a file, or None for memory."""
        spill = spill_of(self.model)
        if spill is None:
            yield None
            return
        waiting = spill.claim(nbytes, in_file=self.budget is not None)
        try:
            yield waiting
        finally:
            if waiting is None:
                spill.release(nbytes)
            else:
                waiting.close()


def make_request(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None,
    positions: Positions | None,
    attention_mask: Mask | None,
    readouts: Iterable[Readout],
    memory_budget: int | str | None,
    dense: bool = False,
    embeddings: Embeddings | None = None,
    progress: bool = False,
    products: torch.dtype | str | None = None,
) -> Request:
    """Check what is asked for. `dense` allows layers without experts. Raises `ValueError` for what cannot be measured."""
    tokens, attention_mask = model.as_tokens(tokens, attention_mask)
    require_unhooked(model)
    packed = pack(tokens, attention_mask, positions, _checked_embeddings(model, embeddings, tokens))
    named = by_name(readouts, model, packed)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return Request(
        model, checked_layers(model, layers, dense), packed, named, budget, progress, checked_products(model, products)
    )


def _checked_embeddings(
    model: Transformer, embeddings: Any, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"] | None:
    if embeddings is None:
        return None
    expected = [*tokens.shape, model.cfg.d_model]
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point() or list(embeddings.shape) != expected:
        got = f"{embeddings.dtype} {list(embeddings.shape)}" if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"embeddings must be a float tensor [batch, pos, d_model] = {expected}, as the tokens are, not {got}")
    return embeddings.detach().to(model.cfg.device, model.cfg.dtype)


_PRODUCTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def checked_products(model: Transformer, products: Any) -> torch.dtype | None:
    """The dtype. Raises `ValueError` for any but bfloat16, float16 and None, for a model in half precision, and for weights whose
    views are copies."""
    if products is None:
        return None
    name = next((name for name, dtype in _PRODUCTS.items() if products in (name, dtype)), None)
    if name is None:
        raise ValueError(f"products must be 'bfloat16', 'float16' or None, not {described(products)}")
    if model.cfg.dtype.itemsize < 4:
        raise ValueError(
            f"products={name!r} rounds what a removal changes alone, and this model rounds everything to {model.cfg.dtype}: "
            "load it with dtype='float32' (store='bfloat16' keeps the experts' weights as small)"
        )
    for weight, parameter in model.named_parameters():
        if not parameter.is_contiguous():  # a product knows its weight by the address, and views of these are copies
            raise ValueError(f"products={name!r} takes contiguous weights, which {weight} is not: make it so, by .contiguous()")
    return _PRODUCTS[name]


def require_unhooked(model: Transformer) -> None:
    """Raise `ValueError` if hooks are attached: they would act on batches of variants."""
    hooked = [name for name, point in model.hook_dict.items() if point.active]
    if hooked:
        raise ValueError(
            f"counterfactuals measure the unhooked model, and {hooked[0]} has hooks: call model.reset_hooks() first "
            "(including_permanent=True for permanent hooks)"
        )


def checked_layers(model: Transformer, layers: Layers | None, dense: bool = False) -> list[int]:
    """The layers, in order; None means all with experts, or, with `dense`, all. Raises `ValueError` for others."""
    cfg = model.cfg
    if layers is None:
        return list(range(cfg.n_layers)) if dense else cfg.moe_layers
    chosen = sorted(set(whole_numbers(layers, "layers", cfg.n_layers)))
    for layer in chosen:
        if not 0 <= layer < cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {cfg.n_layers - 1}")
        if not dense and not cfg.experts_in(layer):
            raise ValueError(f"layer {layer} is dense: it has no experts; layers {cfg.moe_layers} have")
    if not chosen:
        raise ValueError("no layers to measure: layers is empty")
    return chosen


def checked_n_variants(n_variants: Any) -> int:
    """The number of variants to measure. Raises `ValueError` unless it is a whole number from 1."""
    number = as_int_or_none(n_variants)
    if number is None or number < 1:
        raise ValueError(f"the number of variants must be a whole number from 1, not {described(n_variants)}")
    return number
