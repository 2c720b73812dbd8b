"""First-order attribution: what the gradient says of every removal, without making one.

    first_order_effects(model, tokens).first_order[layer, batch, pos, slot]     # nats

Removing expert e at position t moves the routed output y_t by -g E_e(x_t). To first order the loss there moves by
`-g E_e(x_t) . dloss_t/dy_t`: the estimate of Molchanov et al. 2017 (arXiv 1611.06440), at a single token. As with the exact
effects at `scope="position"`, only token t changes, so the gradient runs through the residual stream of position t alone:
keys and values of earlier positions are constants.

One backward pass over a window gives this for all positions at once. Where attention looks at other positions, no gradient
passes; hence the gradient of the sum of all losses is, at each position, that of its own loss. Where the activations of all
blocks together would take too much memory, blocks are run again on the way back, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.attention import Attention, QueriesKeysValues
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, attend_to_earlier, clean_block, rotation_of
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.requests import WAITING_BYTES, Embeddings, Layers, Mask, Request, Tokens, make_request
from hooked_moe.counterfactuals.results import ExpertEffects, TensorResult
from hooked_moe.kernels.cpu.prefix_attention import for_every_head
from hooked_moe.kernels.prefix_attention import own_share
from hooked_moe.kernels.target_loss import target_loss
from hooked_moe.progress import progress_bar
from hooked_moe.tables import Column
from hooked_moe.transformer import Transformer

BACKWARD_ACTIVATIONS = 2
"""What a block keeps for its backward pass, and the gradients in it, in multiples of what it takes going forward."""

LOSSES_PER_CHUNK = 256
"""Tokens whose logits and their gradients are in memory together."""


@dataclass(frozen=True, repr=False)
class FirstOrderEffects(TensorResult):
    """Slots are those of `ExpertEffects`; nan (`expert_index` -1) where there is no token, and nan where it has no next one."""

    layers: list[int]
    first_order: Float[Tensor, "layer batch pos slot"]
    """`-g E . dloss/dy`: the first-order estimate of the loss without the expert minus the loss with it, in nats."""
    expert_index: Int[Tensor, "layer batch pos slot"]

    AXES: ClassVar = ExpertEffects.AXES
    PRESENT: ClassVar = "expert_index"
    COLUMNS: ClassVar = {
        "expert_index": ExpertEffects.COLUMNS["expert_index"],
        "first_order": Column(
            "layer batch pos slot", "nats", "first-order estimate of the removal's effect; NaN if there is none"
        ),
    }


@torch.inference_mode(False)
@without_autocast()
def first_order_effects(
    model: Transformer,
    tokens: Tokens,
    layers: Layers | None = None,
    attention_mask: Mask | None = None,
    *,
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> FirstOrderEffects:
    """The first-order estimate of every removal of one expert at one token, its output zeroed.

    The cost is about that of three or four forward passes. `layers` None means all that have experts; padding may be
    anywhere in `attention_mask`; `embeddings` [batch, pos, d_model] are what the run begins with, in place of the tokens' own;
    `memory_budget` ("4GB", or bytes) bounds the memory beside weights and results; `progress` shows a bar that counts rows.
    Raises `ValueError` for layers out of range or dense, for a budget too small for one row, while hooks are attached, and for
    a model whose weights are streamed, since a backward pass takes its layers in the other order.
    """
    model.require_weights("a gradient")
    request = make_request(model, tokens, layers, None, attention_mask, (), memory_budget, embeddings=embeddings)
    results = Results(request.layers, (len(request.packed.tokens), request.packed.original_length))
    rows, keep = _rows_per_group(model, request.packed, request.budget)
    with progress_bar(len(request.packed.tokens), "first order", "row", shown=progress) as bar:
        for packed in request.packed.split(rows):
            _put_estimates(results, request, packed, keep)
            bar.update(len(packed.tokens))
    return FirstOrderEffects(request.layers, results.tables["first_order"], results.tables["expert_index"])


def _put_estimates(results: Results, request: Request, packed: Packed, keep: bool) -> None:
    """Estimates of some rows, into the results."""
    for clean, gradient in _backward(request.model, packed, request.layers[0], keep):
        if clean.layer in request.layers:
            assert isinstance(clean, CleanExperts)
            estimates = _along_contributions(clean, gradient).masked_fill(packed.targets.unsqueeze(-1) < 0, float("nan"))
            results.put("first_order", estimates[None], packed, [clean.layer])
            results.put("expert_index", clean.routing.indices[None], packed, [clean.layer])


def _along_contributions(clean: CleanExperts, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos slot"]:
    """The gradient along the removal of each active expert: minus its contribution to the routed output."""
    outputs = clean.expert_outputs.in_slots().detach()
    along = (at_least_float32(outputs) * at_least_float32(gradient).unsqueeze(-2)).sum(-1)
    return -at_least_float32(clean.routing.weights.detach()) * along


def _backward(
    model: Transformer, packed: Packed, lowest: int, keep: bool
) -> Iterator[tuple[CleanBlock, Float[Tensor, "batch pos d_model"]]]:
    """Every block from the last down to `lowest`, with d(loss of a position)/d(residual stream there after the block).

    `keep` keeps the activations of all blocks on the way up; else those on the way down are computed again.
    """
    rotate = rotation_of(model, packed.tokens.shape[1])

    def run(layer: int, before: Tensor, differentiable: bool) -> CleanBlock:
        with torch.set_grad_enabled(differentiable):
            attend = attend_by_own_stream if differentiable else attend_to_earlier
            return clean_block(model.blocks[layer], layer, before.requires_grad_(differentiable), rotate, attend)

    with torch.no_grad():
        before = [packed.embed(model)]
    kept: list[CleanBlock] = []
    for layer in range(model.cfg.n_layers):
        clean = run(layer, before[-1], differentiable=keep and layer > lowest)
        before.append(clean.resid_post.detach())
        if keep and layer >= lowest:
            kept.append(clean)
    gradient = _loss_gradient(model, before.pop(), packed.targets)
    for layer in reversed(range(lowest, model.cfg.n_layers)):
        resid = before.pop()
        clean = kept.pop() if keep else run(layer, resid, differentiable=layer > lowest)
        yield clean, gradient
        if layer > lowest:
            (gradient,) = torch.autograd.grad(clean.resid_post, resid, gradient)


def _loss_gradient(
    model: Transformer, resid: Float[Tensor, "batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """Of every position's loss, with respect to its final residual stream; zero where there is no next token."""
    gradient, weight = torch.zeros_like(resid), at_least_float32(model.unembed.W_U.detach())
    for rows in (targets >= 0).nonzero().split(LOSSES_PER_CHUNK):
        batch, pos = rows.unbind(-1)
        x = resid[batch, pos].requires_grad_()
        with torch.enable_grad():
            loss = target_loss(model.ln_final(at_least_float32(x)), weight, targets[batch, pos]).sum()
        (gradient[batch, pos],) = torch.autograd.grad(loss, x)
    return gradient


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
    if left >= residuals + n_layers * block:
        return left // (residuals + n_layers * block), True
    least = least_budget(model.cfg, length)
    if budget is not None and budget < least:
        raise ValueError(f"memory_budget is {budget:,} bytes, and the gradient of a row of {length} tokens takes {least:,}")
    return max(1, left // (residuals + block)), False
