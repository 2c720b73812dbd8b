"""Any change of the residual stream at one token: the general form of a question."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.checks import by_number
from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.question import Question, Variants
from hooked_moe.counterfactuals.engine.readout import Readout
from hooked_moe.counterfactuals.engine.requests import (
    Embeddings,
    Layers,
    Mask,
    Positions,
    Tokens,
    checked_n_variants,
    make_request,
)
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.counterfactuals.results import VariantEffects, as_variant_effects
from hooked_moe.transformer import Transformer


class Queries(NamedTuple):
    """Which token each query is: batch row and position in the tokens given; -1 where a row has fewer queries than others."""

    batch: Int[Tensor, "batch query"]
    pos: Int[Tensor, "batch query"]


class VariantQueries(NamedTuple):
    """Which variant of which token each query is. A row is one variant of one batch row."""

    variant: Int[Tensor, "row query"]
    batch: Int[Tensor, "row query"]
    pos: Int[Tensor, "row query"]


Edit = Callable[[CleanBlock, Queries], Float[Tensor, "variant batch query d_model"]]
VariantEdit = Callable[[CleanBlock, VariantQueries], Float[Tensor, "row query d_model"]]


@pausable
def token_effects(
    model: Transformer,
    tokens: Tokens,
    edit: Edit | Mapping[int, VariantEdit],
    n_variants: int = 1,
    layers: Layers | None = None,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    readouts: Iterable[Readout] = (),
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Steps[VariantEffects]:
    """Change the residual stream after a block at one token at a time, in any way, and measure the loss there.

    `edit(clean, queries)` is called for each layer of `layers` (default: all, dense ones too) and returns `n_variants` residual
    streams after that block, [variant, batch, query, d_model], for all queried positions at once. `clean` holds what the clean
    run computed there: `clean.resid_mid`, `.mlp_input`, `.resid_post` [batch, query, d_model], and in layers with experts
    `.routing`, `.expert_outputs`, `.shared_out` and the module `.moe`. In each variant that one token alone is changed. All of
    these may be written to in place, the model's parameters not: the clean run continues from memory of its own.

        def steer(clean, queries):
            return clean.resid_post + strengths[:, None, None, None] * direction     # one variant per strength

    Exact, as `expert_effects` is, and as fast. `queries.pos` is the position in `tokens`, so that padded rows need no care.
    `embeddings` [batch, pos, d_model] are what the run begins with, in place of the tokens' own.

    A mapping `{layer: edit}` changes the token in several layers of the same variant, which makes one effect of each: the layer
    axis has the first of them only. Each of its edits sees what the variants themselves computed in the block, earlier edits
    and all: its first argument has a row for each variant of each batch row, `queries.variant`, `.batch` and `.pos` say which,
    and it returns their residual streams after the block, [row, query, d_model].

        def steer(own, queries):
            return own.resid_post + strengths[queries.variant, None] * direction

        token_effects(model, tokens, {2: steer, 4: steer}, n_variants=len(strengths))
    """
    n_variants = checked_n_variants(n_variants)
    edits: dict[int, VariantEdit] = {}
    if isinstance(edit, Mapping):
        if layers is not None:
            raise ValueError("layers= goes with one edit for all layers; {layer: edit} says itself which layers are changed")
        edits = by_number(edit, "layer")
        layers = list(edits)
    request = make_request(
        model,
        tokens,
        layers,
        positions,
        attention_mask,
        readouts,
        memory_budget,
        dense=True,
        embeddings=embeddings,
        progress=progress,
    )
    if not isinstance(edit, Mapping):
        return as_variant_effects((yield from answer(Edited(n_variants, edit), request)))
    first, *later = request.layers
    question = EditedTogether(n_variants, edits, later)
    return as_variant_effects((yield from answer(question, replace(request, layers=[first]))))


@dataclass(frozen=True)
class Edited(Question):
    n_variants: int
    edit: Edit

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        positions = packed.asked_positions()
        # Of what an edit is given, the clean run and the results still need these; the rest it may write to as it is.
        writable = replace(clean.at_window_starts(width), resid_post=clean.resid_post[:, ::width].clone())
        edited = self.edit(writable, Queries(packed.rows[:, None].expand_as(positions).clone(), positions.clone()))
        check_edited(edited, (self.n_variants, *positions.shape, clean.resid_post.shape[-1]))
        windows = clean.resid_post.expand(self.n_variants, -1, -1, -1).clone()
        windows[:, :, ::width] = edited
        return windows


@dataclass(frozen=True, eq=False)
class EditedTogether(Question):
    """The token is changed in several layers of the same variant."""

    n_variants: int
    edits: dict[int, VariantEdit]
    layers_again: Collection[int] = ()

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        batch = torch.arange(len(packed.rows), device=packed.rows.device)
        edited = self.branch_again(clean.rows(batch.repeat(self.n_variants)), 0, packed, width)
        return edited.unflatten(0, (self.n_variants, -1))

    def branch_again(self, own: CleanBlock, first: int, packed: Packed, width: int) -> Float[Tensor, "row token d_model"]:
        positions = packed.asked_positions()
        count = len(own.resid_post) // len(positions)
        queries = VariantQueries(
            torch.arange(first, first + count, device=positions.device)
            .repeat_interleave(len(positions))[:, None]
            .expand(-1, positions.shape[1]),
            packed.rows[:, None].expand_as(positions).repeat(count, 1),
            positions.repeat(count, 1),
        )
        resid_post = own.resid_post.clone()
        edited = self.edits[own.layer](own.at_window_starts(width), queries)
        check_edited(edited, (*queries.pos.shape, own.resid_post.shape[-1]), "row, query")
        resid_post[:, ::width] = edited
        return resid_post


def check_edited(edited: Any, expected: tuple[int, ...], axes: str = "variant, batch, query") -> None:
    """Raise `ValueError` unless an edit returned residual streams of the expected shape."""
    if not isinstance(edited, Tensor) or not edited.is_floating_point():
        got = edited.dtype if isinstance(edited, Tensor) else type(edited).__name__
    elif edited.shape != expected:
        got = f"shape {list(edited.shape)}"
    else:
        return
    raise ValueError(f"edit returned {got}; expected a float tensor [{axes}, d_model] = {list(expected)}")
