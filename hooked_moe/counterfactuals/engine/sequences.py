"""Changes of whole sequences: a forward from the next layer on for each (sequence, expert that it uses)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, as_expert_block, clean_blocks, gather_positions
from hooked_moe.counterfactuals.engine.losses import PredictionChange, loss_at, prediction_change
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
    """Loss and prediction at every position without the expert of each of its slots, into the results as `delta_loss` and `kl`.

    Where weights are in memory, each removal goes through the later layers at once, after a clean run that says what to compare
    it with. Where they are streamed, all removals of all layers go along with the clean run and wait between blocks, so that
    each block is read once.
    """
    model = request.model
    chunk_size = request.chunk_size(question.n_variants)
    batch, length = packed.tokens.shape
    most = len(layers) * batch * max(model.cfg.experts_in(layer) for layer in layers)
    under_way: list[Steps[None]] = []
    measured: list[_Removed] = []
    end, wide = _End(model, packed), torch.promote_types(model.cfg.dtype, torch.float32)
    if not model.streams:
        end.learn(run_to_end(clean_blocks(model, packed.embed(model), lambda clean: None)))
    with request.waiting_room(most * length * model.cfg.d_model * model.cfg.dtype.itemsize) as waiting:

        def visit(clean: CleanBlock) -> None:
            observe(clean)
            if model.streams and clean.layer + 1 == model.cfg.n_layers:
                end.learn(clean.resid_post)
            under_way[:] = [removals for removals in under_way if advance_one_layer(removals)]
            if clean.layer not in layers:
                return
            experts = as_expert_block(clean)
            shape = batch, experts.moe.num_experts, length
            nothing = torch.full(shape, float("nan"), dtype=wide, device=model.cfg.device)
            removed = _Removed(experts.routing.indices, nothing, nothing.clone())
            measured.append(removed)
            for removals in _removals(question, experts, removed, end, waiting, chunk_size):
                if not model.streams:
                    run_to_end(removals)
                elif advance_one_layer(removals):
                    under_way.append(removals)

        yield from clean_blocks(model, packed.embed(model), visit)
    results.put_baseline(end.baseline, packed)
    deltas = [removed.by_slot(removed.losses) - end.baseline.unsqueeze(-1) for removed in measured]
    divergences = [removed.by_slot(removed.kl) for removed in measured]
    at_queries = partial(gather_positions, positions=packed.query_positions)
    results.put("delta_loss", torch.stack([at_queries(delta) for delta in deltas]), packed, layers)
    results.put_kl(torch.stack([at_queries(kl) for kl in divergences]), packed, layers)


class _Removed(NamedTuple):
    """What the removals of one layer did, by the expert that was removed."""

    indices: Int[Tensor, "batch pos slot"]
    losses: Float[Tensor, "batch expert pos"]
    kl: Float[Tensor, "batch expert pos"]

    def by_slot(self, values: Float[Tensor, "batch expert pos"]) -> Float[Tensor, "batch pos slot"]:
        return values.transpose(1, 2).gather(-1, self.indices)


class _End:
    """The end of the clean run, which removals are compared with."""

    resid: Float[Tensor, "batch pos d_model"]
    baseline: Float[Tensor, "batch pos"]

    def __init__(self, model: Transformer, packed: Packed) -> None:
        self.model, self.targets = model, packed.targets

    def learn(self, resid: Float[Tensor, "batch pos d_model"]) -> None:
        self.resid, self.baseline = resid, loss_at(self.model, resid[None], self.targets)[0]

    def compare(self, resid: Float[Tensor, "pair pos d_model"], row: Int[Tensor, " pair"]) -> PredictionChange:
        """What final residual streams of batch rows `row` predict, [pair, pos]; nan where there is no next token."""
        change = PredictionChange(*(self.baseline.new_empty(resid.shape[:2]) for _ in range(2)))
        for batch_row in row.unique().tolist():
            own = row == batch_row
            clean, targets = self.resid[batch_row][None], self.targets[batch_row][None]
            of_row = prediction_change(self.model, resid[own].unsqueeze(1), clean, targets)
            change.losses[own], change.kl[own] = of_row.losses.squeeze(1), of_row.kl.squeeze(1)
        return change


def _removals(
    question: SequenceQuestion,
    clean: CleanExperts,
    removed: _Removed,
    end: _End,
    waiting: Waiting | None,
    chunk_size: int,
) -> Iterator[Steps[None]]:
    """Every (sequence, expert that it uses) of a layer, a few at a time. They fill in what they did at the end."""
    indices = clean.routing.indices
    used = torch.zeros(removed.losses.shape[:2], dtype=torch.bool, device=indices.device).scatter_(1, indices.flatten(1), True)
    for pairs in used.nonzero().split(max(1, chunk_size // indices.shape[1])):
        row, expert = pairs.unbind(-1)
        resid = question.without_experts(clean.rows(row), expert)
        yield _to_the_end(clean.layer, row, expert, resid, removed, end, waiting)


def _to_the_end(
    layer: int,
    row: Tensor,
    expert: Tensor,
    resid: Float[Tensor, "pair pos d_model"],
    removed: _Removed,
    end: _End,
    waiting: Waiting | None,
) -> Steps[None]:
    """Residual streams after `layer` through the layers that follow, with a pause before each."""
    model = end.model
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
    removed.losses[row, expert], removed.kl[row, expert] = end.compare(resid, row)
