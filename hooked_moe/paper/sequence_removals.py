"""Experts removed from a whole sequence, measured at single positions: what the released code of arXiv 2606.10703 measures.

Only the experts asked for are removed, so a few positions of a text cost a few partial forwards;
`counterfactuals.expert_effects(scope="sequence")` removes every one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.chunks import VARIANT_TOKENS_PER_CHUNK
from hooked_moe.counterfactuals.engine.losses import loss_at
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.transformer import Transformer


class SequenceRemoval(NamedTuple):
    """Some experts of one layer, removed at every token, and the position whose prediction is measured."""

    layer: int
    experts: frozenset[int]
    position: int


class RemovalLosses(NamedTuple):
    """-log p(next token) at each removal's position, in nats."""

    baseline: Float[np.ndarray, " removal"]
    removed: Float[np.ndarray, " removal"]


@torch.no_grad()
@without_autocast()
def sequence_removals(model: Transformer, tokens: Int[Tensor, " pos"], removals: Sequence[SequenceRemoval]) -> RemovalLosses:
    """The losses of one text without and with each removal. Equal removals of different positions share a forward.

    Raises `ValueError` for a position without a next token.
    """
    positions = torch.tensor([removal.position for removal in removals], dtype=torch.long, device="cpu")
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(tokens) - 1:
        raise ValueError(
            f"positions {sorted(set(positions.tolist()))}: this text of {len(tokens)} tokens has 0 to {len(tokens) - 2}"
        )
    device = model.cfg.device
    tokens = tokens.to(device)
    read = tokens[None, : int(positions.max()) + 1]  # later tokens change nothing earlier
    by_layer: dict[int, list[int]] = defaultdict(list)
    for number, removal in enumerate(removals):
        by_layer[removal.layer].append(number)

    losses = np.full((2, len(removals)), np.nan)
    resid, reached = read, None
    for layer in sorted(by_layer):
        resid = model(resid, start_at_layer=reached, stop_at_layer=layer)
        reached = layer
        losses[1, by_layer[layer]] = _losses_of_layer(model, tokens, resid, layer, [removals[n] for n in by_layer[layer]])
    final = model(resid, start_at_layer=reached, stop_at_layer=model.cfg.n_layers)
    losses[0] = _losses(model, final[0, positions.to(device)], tokens[positions.to(device) + 1])
    return RemovalLosses(*losses)


def _losses_of_layer(
    model: Transformer,
    tokens: Int[Tensor, " pos"],
    resid: Float[Tensor, "1 read d_model"],
    layer: int,
    removals: Sequence[SequenceRemoval],
) -> Float[np.ndarray, " removal"]:
    """Every distinct set of experts is a row of a batch, read up to the last position that asks for it."""
    sets = {experts: row for row, experts in enumerate(dict.fromkeys(removal.experts for removal in removals))}
    keep = torch.ones(len(sets), 1, model.cfg.experts_in(layer), dtype=torch.bool, device=resid.device)
    for experts, row in sets.items():
        keep[row, 0, sorted(experts)] = False
    rows = np.array([sets[removal.experts] for removal in removals])
    positions = np.array([removal.position for removal in removals])
    needed = np.zeros(len(sets), dtype=np.int64)
    np.maximum.at(needed, rows, positions + 1)

    losses = np.empty(len(removals))
    pending = np.argsort(-needed, kind="stable")  # longest first, so that the rows of a batch are of about one length
    while len(pending):
        length = int(needed[pending[0]])
        rows_per_batch = max(1, VARIANT_TOKENS_PER_CHUNK // length)
        batch, pending = pending[:rows_per_batch], pending[rows_per_batch:]
        mask = ExpertMask({layer: keep[torch.from_numpy(batch)]})
        read = resid[:, :length].expand(len(batch), -1, -1)
        final = model(read, start_at_layer=layer, stop_at_layer=model.cfg.n_layers, expert_mask=mask)
        served = np.flatnonzero(np.isin(rows, batch))
        batch_row = {row: number for number, row in enumerate(batch.tolist())}
        of_batch = torch.tensor([batch_row[row] for row in rows[served].tolist()], dtype=torch.long, device=resid.device)
        position = torch.from_numpy(positions[served]).to(resid.device)
        losses[served] = _losses(model, final[of_batch, position], tokens[position + 1])
    return losses


def _losses(
    model: Transformer, resid: Float[Tensor, "removal d_model"], targets: Int[Tensor, " removal"]
) -> Float[np.ndarray, " removal"]:
    losses = loss_at(model, resid[None, None], targets[None])[0, 0]
    return losses.cpu().numpy().astype(np.float64)
