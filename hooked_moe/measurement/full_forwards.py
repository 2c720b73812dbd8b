"""Ordinary forward passes with removals in them, which verification compares the fast counterfactuals with.

They pause after every layer, so that many share one reading of streamed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.counterfactuals import Scope
from hooked_moe.counterfactuals.engine.steps import Steps
from hooked_moe.expert_mask import ExpertMask, RemovalName
from hooked_moe.transformer import LogitsAndLoss, Transformer


@runtime_checkable
class RemovedInLayer(Protocol):
    """What is removed in one layer, which depends on the experts that serve the tokens there."""

    @property
    def removal(self) -> RemovalName: ...

    def kept(self, indices: Int[Tensor, "pos slot"], n_experts: int) -> Bool[Tensor, "pos expert"]: ...


RemovalsByRow = Mapping[int, Mapping[int, RemovedInLayer]]
"""By layer, and there by batch row."""
_NONE: RemovalsByRow = MappingProxyType({})


def forward_by_layer(model: Transformer, tokens: Int[Tensor, "1 pos"], removals: RemovalsByRow = _NONE) -> Steps[LogitsAndLoss]:
    """An ordinary forward of one sequence."""
    stream = yield from _last_stream(model, tokens, removals)
    return model(stream, "both", loss_per_token=True, start_at_layer=model.cfg.n_layers, tokens=tokens)


def losses_without(
    model: Transformer, tokens: Int[Tensor, "1 pos"], removals: RemovalsByRow = _NONE
) -> Steps[Float[Tensor, "1 pos-1"]]:
    """The losses of that."""
    return (yield from forward_by_layer(model, tokens, removals)).loss


def losses_of_rows(
    model: Transformer, tokens: Int[Tensor, "1 pos"], removed: Sequence[tuple[int, Removed] | None]
) -> Steps[Float[Tensor, "row pos-1"]]:
    """The losses of as many copies of a sequence, in a forward for all of them: each without what is removed there in a layer."""
    by_layer: dict[int, dict[int, RemovedInLayer]] = {}
    for row, place in enumerate(removed):
        if place is not None:
            by_layer.setdefault(place[0], {})[row] = place[1]
    streams = yield from _last_stream(model, tokens.expand(len(removed), -1), by_layer)
    options: dict[str, Any] = {"loss_per_token": True, "start_at_layer": model.cfg.n_layers, "tokens": tokens}
    return torch.cat([model(stream, "loss", **options) for stream in streams.split(1)])  # one row's logits at a time


def _last_stream(
    model: Transformer, tokens: Int[Tensor, "row pos"], removals: RemovalsByRow
) -> Steps[Float[Tensor, "row pos d"]]:
    """The residual streams after the last block, layer by layer, with removals in some of them."""
    stream, n_layers = tokens, model.cfg.n_layers
    for layer in range(n_layers):
        options: dict[str, Any] = {"start_at_layer": layer or None, "stop_at_layer": layer + 1}
        mask = None
        if layer in removals:
            rows = removals[layer]
            served: list[Tensor] = []
            hook = (f"blocks.{layer}.mlp.hook_expert_indices", lambda indices, hook, served=served: served.append(indices))
            model.run_with_hooks(stream[list(rows)], fwd_hooks=[hook], **options)
            keep = torch.ones(*tokens.shape, model.cfg.experts_in(layer), dtype=torch.bool, device=tokens.device)
            for (row, removal), indices in zip(rows.items(), served[0], strict=True):
                keep[row] = removal.kept(indices, keep.shape[-1])
            mask = ExpertMask({layer: keep}, next(iter(rows.values())).removal)
        stream = model(stream, expert_mask=mask, **options)
        if layer + 1 < n_layers:
            yield
    return stream


@dataclass(frozen=True)
class Everything:
    """The removal of all experts at all tokens."""

    removal: RemovalName = "zero"

    def kept(self, indices: Int[Tensor, "pos slot"], n_experts: int) -> Bool[Tensor, "pos expert"]:
        return torch.zeros(len(indices), n_experts, dtype=torch.bool, device=indices.device)


@dataclass
class Removed:
    """The removal of the expert in one slot of a token, in a scope around it; or of the first that is in none of its slots."""

    pos: int
    slot: int | None
    removal: RemovalName = "zero"
    scope: Scope = "position"
    expert: int = -1
    """Which expert that was."""

    def kept(self, indices: Int[Tensor, "pos slot"], n_experts: int) -> Bool[Tensor, "pos expert"]:
        at_token = indices[self.pos].tolist()
        self.expert = next(e for e in range(n_experts) if e not in at_token) if self.slot is None else at_token[self.slot]
        removed = (indices == self.expert).any(-1)
        if self.scope == "position":
            removed[:] = False
            removed[self.pos] = True
        if self.scope == "from_position":
            removed[: self.pos] = False
        keep = torch.ones(len(removed), n_experts, dtype=torch.bool, device=removed.device)
        keep[removed, self.expert] = False
        return keep
