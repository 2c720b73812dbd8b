"""Many interventions as rows of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import WrongTypeError, described, in_list, is_hook
from hooked_moe.components.losses import loss_of
from hooked_moe.counterfactuals.engine.memory import demand_of, parse_bytes
from hooked_moe.counterfactuals.engine.requests import WAITING_BYTES, require_unhooked
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.hooks.hooked_module import Hook
from hooked_moe.transformer import LogitsAndLoss, ReturnType, Transformer

HookEdit = Hook | Iterable[Hook]
"""One intervention: a hook (name or predicate, function), or several that act together."""


@torch.no_grad()
def run_variants(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"] | str | list[str],
    edits: Iterable[HookEdit],
    return_type: ReturnType = "logits",
    *,
    loss_per_token: bool = False,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    memory_budget: int | str | None = None,
) -> Any:
    """See `HookedMoE.run_variants`."""
    require_unhooked(model)
    if return_type not in ("logits", "loss", "both"):
        raise ValueError(f"return_type must be 'logits', 'loss' or 'both', not {return_type!r}")
    edits = in_list(edits, "edits", "[(name, function)]")
    if not edits:
        raise ValueError("no edits: give one or more, each a (name, function) pair or a list of them")
    tokens, mask = model.as_tokens(tokens, attention_mask)
    group_size = _rows_per_group(model, tokens, None if memory_budget is None else parse_bytes(memory_budget))
    variants = [_resolve(model, number, edit) for number, edit in enumerate(edits)]
    starts = sorted({variant.start for variant in variants})
    before = _residuals_before(model, tokens, mask, starts)
    logits: list[Tensor | None] = [None] * len(edits)
    losses: list[Tensor | None] = [None] * len(edits)
    ordered = sorted(variants, key=lambda variant: variant.start)  # those that start together run together
    for first in range(0, len(ordered), group_size):
        group = ordered[first : first + group_size]
        out = _run_group(model, group, before[group[0].start], mask)
        for variant, row in zip(group, out.unflatten(0, (len(group), -1)), strict=True):
            if return_type != "logits":
                losses[variant.number] = loss_of(row, tokens, mask, loss_per_token)
            if return_type != "loss":
                logits[variant.number] = row
    if return_type == "logits":
        return _stacked(logits)
    return _stacked(losses) if return_type == "loss" else LogitsAndLoss(_stacked(logits), _stacked(losses))


@dataclass(frozen=True)
class Variant:
    """One intervention, found: its hooks, and the first layer that any of them touches (-1: the embedding)."""

    number: int
    hooks: list[tuple[HookPoint, Callable[..., Any]]]
    start: int


def _resolve(model: Transformer, number: int, edit: HookEdit) -> Variant:
    pairs: Any = [edit] if is_hook(edit) else list(edit) if isinstance(edit, Iterable) else None
    if pairs is None or isinstance(edit, str | Mapping) or not all(map(is_hook, pairs)):
        raise WrongTypeError(
            f"edit {number} must be a (name, function) pair or a list of them, not {described(edit)}; "
            "edits are a list, as in [(name, function)]"
        )
    hooks = [(point, fn) for which, fn in pairs for point in model.hook_points(which)]
    if not hooks:
        raise ValueError(f"edit {number} has no hooks")
    return Variant(number, hooks, min(_layer_of(model, point) for point, _ in hooks))


def _layer_of(model: Transformer, point: HookPoint) -> int:
    if point.name.startswith("blocks."):
        return point.layer()
    return -1 if point.name == "hook_embed" else model.cfg.n_layers


def _residuals_before(
    model: Transformer, tokens: Tensor, mask: Tensor | None, starts: list[int]
) -> dict[int, Float[Tensor, "batch pos d_model"]]:
    """The clean residual stream before each of these layers; before -1: the embeddings, which hooks may edit."""
    before = {-1: model.embed(tokens)}
    resid, done = before[-1], 0
    for start in (start for start in starts if start >= 0):
        resid = model(resid, start_at_layer=done, stop_at_layer=start, attention_mask=mask)
        before[start], done = resid, start
    return before


def _run_group(model: Transformer, group: list[Variant], resid: Tensor, mask: Tensor | None) -> Float[Tensor, "row pos d_vocab"]:
    """Logits of all variants of a group, rows of one batch, from the first layer that any of them touches."""
    batch = len(resid)
    by_point: dict[HookPoint, list[tuple[int, Callable[..., Any]]]] = {}
    for place, variant in enumerate(group):
        for point, fn in variant.hooks:
            by_point.setdefault(point, []).append((place, fn))
    hooks = [(point.name, _OnOwnRows(edits, batch)) for point, edits in by_point.items()]
    rows = resid.repeat(len(group), 1, 1)
    with model.hooks(hooks):
        if group[0].start < 0:
            rows = model.hook_embed(rows)
        all_masks = None if mask is None else mask.repeat(len(group), 1)
        return model(rows, start_at_layer=max(0, group[0].start), attention_mask=all_masks)


@dataclass(frozen=True)
class _OnOwnRows:
    """A hook that gives each edit the rows of its own variant, as if it ran alone."""

    edits: list[tuple[int, Callable[..., Any]]]
    batch: int

    def __call__(self, activation: Tensor, hook: HookPoint) -> Tensor:
        tokens = hook.ctx.get("tokens") if ".experts." in hook.name else None
        for place, fn in self.edits:
            if tokens is None:
                own: Any = slice(place * self.batch, (place + 1) * self.batch)
            else:  # an expert's rows are tokens of all variants
                own = tokens[:, 0] // self.batch == place
                hook.ctx["tokens"] = tokens[own] - torch.tensor([place * self.batch, 0], dtype=torch.long, device=tokens.device)
            part = activation[own].clone()
            edited = fn(part, hook=hook)
            activation[own] = part if edited is None else hook.checked(edited, part)
        if tokens is not None:
            hook.ctx["tokens"] = tokens
        return activation


def _rows_per_group(model: Transformer, tokens: Tensor, budget: int | None) -> int:
    """Variants of a group: as many as the budget holds, logits included. Raises `ValueError` if not even one fits."""
    batch, pos = tokens.shape
    demand = demand_of(model.cfg, pos, chunk_size=pos)
    per_variant = batch * (demand.row + pos * (model.cfg.d_vocab * 8 + demand.variant_token))
    if budget is None:
        return max(1, WAITING_BYTES // per_variant)
    needed = demand.fixed + per_variant
    if budget < needed:
        raise ValueError(
            f"memory_budget is {budget:,} bytes, and one variant of {batch} rows of {pos} tokens takes {needed:,} at least"
        )
    return (budget - demand.fixed) // per_variant


def _stacked(parts: list[Tensor | None]) -> Tensor:
    return torch.stack([part for part in parts if part is not None])
