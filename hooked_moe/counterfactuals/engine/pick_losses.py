"""What changes at single tokens predict, where many are at the same token: its clean prediction is made once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.losses import CleanPrediction, PredictionChange, rows_together
from hooked_moe.kernels.target_loss import rows_per_chunk
from hooked_moe.transformer import Transformer

FILLED = 0.8
"""Changes of several tokens are unembedded as a table [change, token]; in each of its rows at least so many cells are used."""


def prediction_change_of_picks(
    model: Transformer,
    changed: Float[Tensor, "batch query d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch query"],
    targets: Int[Tensor, "batch query"],
    products: torch.dtype | None = None,
) -> PredictionChange:
    """`prediction_change` of one variant, whose queries are at these positions of the clean run, several at the same or none."""
    wide = torch.promote_types(changed.dtype, torch.float32)
    losses, kl = (changed.new_full(targets.shape, float("nan"), dtype=wide) for _ in range(2))
    row, query = (targets >= 0).nonzero(as_tuple=True)
    narrow = None if products is None else model.unembed.W_U.to(products)
    token = row * clean.shape[1] + positions[row, query]
    for tokens, pick in _tables(token, rows_per_chunk(model.unembed.W_U, torch.float32)):
        first = row[pick[0]], query[pick[0]]
        prediction = CleanPrediction(model, clean.flatten(0, 1)[tokens], targets[first], narrow)
        for part in _filled(pick, rows_together(changed.device)):
            real = part >= 0
            at = row[part.clamp(min=0)], query[part.clamp(min=0)]
            loss, divergence = prediction.of_first(part.shape[1]).changed_to(changed[at])
            at = at[0][real], at[1][real]
            losses[at], kl[at] = loss[real], divergence[real]
    return PredictionChange(losses[None], kl[None])


def _tables(token: Int[Tensor, " pick"], most_tokens: int) -> Iterator[tuple[Int[Tensor, " own"], Int[Tensor, "change own"]]]:
    """Tokens, those with most picks first, and the picks at each of them: numbers of `token`, and -1 where one has no more."""
    if not len(token):
        return
    own, number, counts = token.unique(return_inverse=True, return_counts=True)
    by_token = number.argsort(stable=True)
    nth = torch.arange(len(token), device=token.device) - (counts.cumsum(0) - counts)[number[by_token]]
    pick = token.new_full((int(counts.max()), len(own)), -1)
    pick[nth, number[by_token]] = by_token
    for some in counts.argsort(descending=True, stable=True).split(most_tokens):
        yield own[some], pick[: int(counts[some[0]]), some]


def _filled(pick: Int[Tensor, "change own"], together: int) -> Iterator[Int[Tensor, "change first"]]:
    """The table from the top in pieces of some rows, each of as many tokens as have a pick in its first row."""
    filled = (pick >= 0).sum(1).tolist()
    start = 0
    while start < len(filled):
        width, end = filled[start], start + 1
        while end < len(filled) and filled[end] >= FILLED * width and width * (end + 1 - start) <= together:
            end += 1
        yield pick[start:end, :width]
        start = end
