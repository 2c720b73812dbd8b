"""Changes of whole sequences: a forward from the next layer on for each (sequence, expert that it uses)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, as_expert_block, clean_blocks, gather_positions
from hooked_moe.counterfactuals.engine.losses import loss_at
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.question import SequenceQuestion
from hooked_moe.counterfactuals.engine.requests import Request
from hooked_moe.counterfactuals.engine.steps import Steps, advance_one_layer, run_to_end
from hooked_moe.loading.spill import Waiting
from hooked_moe.transformer import Transformer


def measure_sequences(
    question: SequenceQuestion,
    request: Request,
    packed: Packed,
    layers: list[int],
    results: Results,
    observe: Callable[[CleanBlock], None],
) -> Steps[None]:
    """The loss at every position without the expert of each of its slots, into the results as `delta_loss`.

    Where weights are in memory, each removal goes through the later layers at once. Where they are streamed, all removals of all
    layers go along with the clean run and wait between blocks, so that each block is read once.
    """
    model = request.model
    chunk_size = request.chunk_size(question.n_variants)
    batch, length = packed.tokens.shape
    most = len(layers) * batch * max(model.cfg.experts_in(layer) for layer in layers)
    under_way: list[Steps[None]] = []
    measured: list[tuple[Tensor, Tensor]] = []
    wide = torch.promote_types(model.cfg.dtype, torch.float32)
    with request.waiting_room(most * length * model.cfg.d_model * model.cfg.dtype.itemsize) as waiting:

        def visit(clean: CleanBlock) -> None:
            observe(clean)
            under_way[:] = [removals for removals in under_way if advance_one_layer(removals)]
            if clean.layer not in layers:
                return
            experts = as_expert_block(clean)
            losses = torch.full((batch, experts.moe.num_experts, length), float("nan"), dtype=wide, device=model.cfg.device)
            measured.append((experts.routing.indices, losses))
            for removals in _removals(question, model, packed, experts, losses, waiting, chunk_size):
                if not model.streams:
                    run_to_end(removals)
                elif advance_one_layer(removals):
                    under_way.append(removals)

        resid = yield from clean_blocks(model, packed.tokens, visit)
    baseline = loss_at(model, resid[None], packed.targets)[0]
    results.put_baseline(baseline, packed)
    deltas = [losses.transpose(1, 2).gather(-1, indices) - baseline.unsqueeze(-1) for indices, losses in measured]
    results.put("delta_loss", torch.stack([gather_positions(delta, packed.query_positions) for delta in deltas]), packed, layers)


def _removals(
    question: SequenceQuestion,
    model: Transformer,
    packed: Packed,
    clean: CleanExperts,
    losses: Float[Tensor, "batch expert pos"],
    waiting: Waiting | None,
    chunk_size: int,
) -> Iterator[Steps[None]]:
    """Every (sequence, expert that it uses) of a layer, a few at a time. They fill in their losses at the end."""
    indices = clean.routing.indices
    used = torch.zeros(losses.shape[:2], dtype=torch.bool, device=indices.device).scatter_(1, indices.flatten(1), True)
    for pairs in used.nonzero().split(max(1, chunk_size // packed.tokens.shape[1])):
        row, expert = pairs.unbind(-1)
        resid = question.without_experts(clean.rows(row), expert)
        yield _to_the_end(model, packed, clean.layer, row, expert, resid, losses, waiting)


def _to_the_end(
    model: Transformer,
    packed: Packed,
    layer: int,
    row: Tensor,
    expert: Tensor,
    resid: Float[Tensor, "pair pos d_model"],
    losses: Float[Tensor, "batch expert pos"],
    waiting: Waiting | None,
) -> Steps[None]:
    """Residual streams after `layer` through the layers that follow, with a pause before each."""
    place = 0 if waiting is None else waiting.place_for(resid)
    for following in range(layer + 1, model.cfg.n_layers):
        if waiting is None:
            yield
        else:
            shape = resid.shape
            waiting.put(resid, place)
            del resid
            yield
            resid = torch.empty(shape, dtype=model.cfg.dtype, device=model.cfg.device)
            waiting.get(resid, place)
        resid = model(resid, start_at_layer=following, stop_at_layer=following + 1)
    losses[row, expert] = loss_at(model, resid[None], packed.targets[row])[0]
