"""First-order attribution: what the gradient says of every removal, without making one.

    effects = first_order_effects(model, tokens)
    effects.first_order[layer, batch, pos, slot]            # nats
    effects.first_order_curved[layer, batch, pos, slot]     # nats, closer to the exact effect

Removing expert e at position t moves the routed output y_t by -g E_e(x_t). To first order the loss there moves by
`-g E_e(x_t) . dloss_t/dy_t`: the estimate of Molchanov et al. 2017 (arXiv 1611.06440), at a single token. As with the exact
effects at `scope="position"`, only token t changes, so the gradient runs through the residual stream of position t alone:
keys and values of earlier positions are constants.

What this misses is above all the curvature of the softmax, which is known without another pass. `first_order_curved` adds what
the change `-g E_e(x_t)` would do to the loss beyond its gradient if it reached the final residual stream as it is
(`loss_head`): in the last layer that makes the estimate exact, but for the tokens that are followed together.

One backward pass over a window gives this for all positions at once. Where attention looks at other positions, no gradient
passes; hence the gradient of the sum of all losses is, at each position, that of its own loss. Where the activations of all
blocks together would take too much memory, blocks are run again on the way back, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.attention import Attention, QueriesKeysValues
from hooked_moe.components.precision import at_least_float32
from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.engine.clean_run import (
    CleanBlock,
    CleanExperts,
    as_expert_block,
    attend_to_earlier,
    clean_block,
    rotation_of,
)
from hooked_moe.counterfactuals.engine.memory import demand_of, variant_bytes
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.requests import (
    WAITING_BYTES,
    Embeddings,
    Layers,
    Mask,
    Request,
    Tokens,
    make_request,
)
from hooked_moe.counterfactuals.engine.shelf import Shelf
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn, pausable, with_gradients
from hooked_moe.counterfactuals.loss_head import LossHead, head_bytes
from hooked_moe.counterfactuals.results import ExpertEffects, TensorResult
from hooked_moe.kernels.cpu.prefix_attention import for_every_head
from hooked_moe.kernels.prefix_attention import own_share
from hooked_moe.progress import progress_bar
from hooked_moe.tables import Column
from hooked_moe.transformer import Transformer

BACKWARD_ACTIVATIONS = 2
"""What a block keeps for its backward pass, and the gradients in it, in multiples of what it takes going forward."""


@dataclass(frozen=True, repr=False)
class FirstOrderEffects(TensorResult):
    """Slots are those of `ExpertEffects`; nan (`expert_index` -1) where there is no token, and nan where it has no next one."""

    layers: list[int]
    first_order: Float[Tensor, "layer batch pos slot"]
    """`-g E . dloss/dy`: the first-order estimate of the loss without the expert minus the loss with it, in nats."""
    first_order_curved: Float[Tensor, "layer batch pos slot"]
    """The same, and what the change `-g E` does beyond the gradient where it is added to the final residual stream, in nats."""
    expert_index: Int[Tensor, "layer batch pos slot"]

    AXES: ClassVar = ExpertEffects.AXES
    PRESENT: ClassVar = "expert_index"
    COLUMNS: ClassVar = {
        "expert_index": ExpertEffects.COLUMNS["expert_index"],
        "first_order": Column(
            "layer batch pos slot", "nats", "first-order estimate of the removal's effect; NaN if there is none"
        ),
        "first_order_curved": Column(
            "layer batch pos slot", "nats", "the same with the curvature of the softmax; NaN if there is none"
        ),
    }


@pausable
def first_order_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None = None,
    attention_mask: Mask | None = None,
    *,
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Steps[FirstOrderEffects]:
    """The first-order estimate of every removal of one expert at one token, its output zeroed; and with the softmax's curvature.

    The cost is about that of three or four forward passes, and for the curvature of two unembeddings and, for each removal, of
    `LIKELY_TOKENS` rows of one. Where weights are streamed, they are read twice: once up, and once back through the layers.
    `layers` None means all that have experts; padding may be anywhere in `attention_mask`; `embeddings` [batch, pos, d_model] are
    what the run begins with, in place of the tokens' own; `memory_budget` ("4GB", or bytes) bounds the memory beside weights and
    results; `progress` shows a bar that counts rows. Raises `ValueError` for layers out of range or dense, for a budget too small
    for one row, and while hooks are attached.
    """
    request = make_request(model, tokens, layers, None, attention_mask, (), memory_budget, embeddings=embeddings)
    results = Results(request.layers, (len(request.packed.tokens), request.packed.original_length))
    rows, keep = _rows_per_group(model, request.packed, request.budget)
    with progress_bar(len(request.packed.tokens), "first order", "row", shown=progress) as bar:
        groups = request.packed.split(rows)
        tasks = [with_gradients(_estimate(request, packed, keep, results, bar.update)) for packed in groups]
        yield from in_turn(tasks, model.streams)
    return FirstOrderEffects(request.layers, **results.tables)


def _estimate(request: Request, packed: Packed, keep: bool, results: Results, count: Callable[[int], object]) -> Steps[None]:
    """The estimates of some rows, into the results; `count` is told how many rows these were."""

    def visit(clean: CleanBlock, head: LossHead, gradient: Tensor) -> None:
        if clean.layer not in request.layers:
            return
        experts = as_expert_block(clean)
        steps = _removals(experts)
        first_order = (steps @ at_least_float32(gradient).unsqueeze(-1)).squeeze(-1)
        estimates = {"first_order": first_order, "first_order_curved": first_order + head.beyond_gradient(steps)}
        for name, values in estimates.items():
            values = values.masked_fill(packed.targets.unsqueeze(-1) < 0, float("nan"))
            results.put(name, values[None], packed, [clean.layer])
        results.put("expert_index", experts.routing.indices[None], packed, [clean.layer])

    with request.waiting_room(packed.tokens.numel() * waiting_bytes(request.model.cfg)) as waiting:
        yield from _backward(request.model, packed, request.layers[0], keep, Shelf(waiting), visit)
    count(len(packed.tokens))


def _removals(clean: CleanExperts) -> Float[Tensor, "batch pos slot d_model"]:
    """What the removal of each active expert adds to the residual stream: minus its contribution to the routed output."""
    weights = at_least_float32(clean.routing.weights.detach())
    return at_least_float32(clean.expert_outputs.in_slots().detach()) * -weights.unsqueeze(-1)


Visit = Callable[[CleanBlock, LossHead, Float[Tensor, "batch pos d_model"]], None]


def _backward(model: Transformer, packed: Packed, lowest: int, keep: bool, shelf: Shelf, visit: Visit) -> Steps[None]:
    """Shows `visit` every block from the last down to `lowest`, with the gradient of each position's loss with respect to the
    residual stream there after the block.

    `keep` keeps the activations of all blocks on the way up; else those on the way down are computed again, from the residual
    streams on the shelf.
    """
    rotate = rotation_of(model, packed.tokens.shape[1])

    def run(layer: int, before: Tensor, differentiable: bool) -> CleanBlock:
        with torch.set_grad_enabled(differentiable):
            attend = attend_by_own_stream if differentiable else attend_to_earlier
            return clean_block(model.blocks[layer], layer, before.requires_grad_(differentiable), rotate, attend)

    with torch.no_grad():
        resid = packed.embed(model)
    kept: list[CleanBlock] = []
    for layer in range(model.cfg.n_layers):
        shelf.put(layer, resid)
        clean = run(layer, resid, differentiable=keep and layer > lowest)
        resid = clean.resid_post.detach()
        if keep and layer >= lowest:
            kept.append(clean)
        del clean
        if layer + 1 < model.cfg.n_layers:
            yield
    head = LossHead.of(model, resid, packed.targets)
    shelf.put("upstream", head.gradient)
    for name, tensor in head.tensors().items():
        shelf.put(name, tensor)
    for layer in reversed(range(lowest, model.cfg.n_layers)):
        resid, gradient = shelf.take(layer), shelf.take("upstream")
        kept_of_head: dict[str, Any] = {name: shelf.take(name) for name in head.tensors()}
        head = replace(head, **kept_of_head)
        clean = kept.pop() if keep else run(layer, resid, differentiable=layer > lowest)
        visit(clean, head, gradient)
        if layer > lowest:
            (gradient,) = torch.autograd.grad(clean.resid_post, resid, gradient)
            shelf.put("upstream", gradient)
            del clean, resid, gradient
            yield


def attend_by_own_stream(attn: Attention, qkv: QueriesKeysValues) -> Float[Tensor, "batch pos head d_value"]:
    """Causal attention, to the bit, whose gradient goes into each position's own query, key and value only.

    A position's own key and value act on its output z through the share p of attention that it pays to itself:
    dz/dv = p, and dz/d(own score) = p (v - z). The terms added here are zero in value and have these derivatives.
    """
    q, k, v = qkv
    z = attn.attend(QueriesKeysValues(q, k.detach(), v.detach()), None)
    scale = attn.cfg.attention_scale
    with torch.no_grad():
        share = own_share(q, k, v, scale, attn.sink, attn.window).unsqueeze(-1).to(z.dtype)
    own_k, own_v = for_every_head(q, k), for_every_head(q, v)
    score = (q.detach() * own_k).sum(-1, keepdim=True) * scale
    moved = (score - score.detach()) * (own_v - z).detach()
    return z + share * (own_v - own_v.detach() + moved)


def waiting_bytes(cfg: HookedMoEConfig) -> int:
    """Bytes of one token that wait between layers: the residual stream before every block, a gradient, and the loss head."""
    return (cfg.n_layers + 1) * variant_bytes(cfg) + head_bytes(cfg)


def least_budget(cfg: HookedMoEConfig, length: int) -> int:
    """Bytes beside the model's weights that the gradient of one row takes, the activations of one block at a time in memory."""
    demand = demand_of(cfg, length, chunk_size=length)
    return demand.fixed + (cfg.n_layers + 2) * length * demand.variant_token + BACKWARD_ACTIVATIONS * demand.row


def _rows_per_group(model: Transformer, packed: Packed, budget: int | None) -> tuple[int, bool]:
    """How many batch rows go back together, and whether the activations of all their blocks are kept: as the budget allows."""
    length, n_layers = packed.tokens.shape[1], model.cfg.n_layers
    demand = demand_of(model.cfg, length, chunk_size=length)
    block = BACKWARD_ACTIVATIONS * demand.row
    residuals = (n_layers + 2) * length * demand.variant_token
    left = demand.row + WAITING_BYTES if budget is None else budget - demand.fixed
    if left >= residuals + n_layers * block and not model.streams:  # what is kept of a block would keep its weights
        return left // (residuals + n_layers * block), True
    least = least_budget(model.cfg, length)
    if budget is not None and budget < least:
        raise ValueError(f"memory_budget is {budget:,} bytes, and the gradient of a row of {length} tokens takes {least:,}")
    return max(1, left // (residuals + block)), False
