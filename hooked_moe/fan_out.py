"""Exact counterfactuals at single tokens, all of them in one sweep over the layers.

A change at position t in layer l leaves positions < t and layers <= l untouched, and only the loss at t is wanted. So each
variant is one token that goes through layers l+1.. on its own, over the clean run's keys and values. Variants of all
positions and layers travel together: where a block of the clean run costs one pass, so does the same block of all variants
that have entered by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_moe.components.attention import QueriesKeysValues
from hooked_moe.components.block import Block
from hooked_moe.components.moe import ExpertOutputs, MoE, Routing, plus
from hooked_moe.components.norm import at_least_float32
from hooked_moe.components.rotary import Rotation, rotation
from hooked_moe.kernels.prefix_attention import prefix_attention
from hooked_moe.kernels.target_loss import target_loss
from hooked_moe.model import HookedMoE

TOKENS_AT_ONCE = 1024
"""Variant tokens that go through a block together: enough for large products, few enough for the cache."""


@dataclass(frozen=True)
class CleanBlock:
    """What the clean run computed in one block."""

    layer: int
    block: Block
    qkv: QueriesKeysValues
    """At every position, whatever `CleanExperts.at` and `.rows` pick of the rest."""
    resid_post: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class CleanExperts(CleanBlock):
    """What it computed in a block with experts."""

    moe: MoE
    resid_mid: Float[Tensor, "batch pos d_model"]
    mlp_input: Float[Tensor, "batch pos d_model"]
    routing: Routing
    expert_outputs: ExpertOutputs
    shared_out: Float[Tensor, "batch pos d_model"] | None

    def rows(self, rows: Int[Tensor, " row"]) -> CleanExperts:
        """The same for some batch rows, which may repeat."""
        return self._map(lambda x: x[rows])

    def at(self, positions: Int[Tensor, "batch query"] | None) -> CleanExperts:
        """The same at some positions only."""
        return self._map(lambda x: take(x, positions))

    def _map(self, pick: Callable[[Tensor], Tensor]) -> CleanExperts:
        return replace(
            self,
            resid_post=pick(self.resid_post),
            resid_mid=pick(self.resid_mid),
            mlp_input=pick(self.mlp_input),
            routing=Routing(*map(pick, self.routing)),
            expert_outputs=ExpertOutputs(self.expert_outputs.rows, pick(self.expert_outputs.place)),
            shared_out=None if self.shared_out is None else pick(self.shared_out),
        )


Branch = Callable[[CleanExperts], Float[Tensor, "variant batch query d_model"]]
"""Makes the variants of one layer from the clean run: the residual stream after its block, at the queried positions."""


class FanOut(NamedTuple):
    """Losses in nats at each variant's own position; nan where there is no next token."""

    losses: Float[Tensor, "layer variant batch query"]
    baseline: Float[Tensor, "batch pos"]


def fan_out(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"],
    layers: Sequence[int],
    n_variants: int,
    branch: Branch,
    positions: Int[Tensor, "batch query"] | None = None,
) -> FanOut:
    """Run `n_variants` changes per layer of `layers` (in order) and position, each read at its own position.

    `targets` is the token that each position should predict, -1 where there is none. `positions` None means all of them.
    Tokens must be padded on the right only: what follows a position does not matter to it.
    """
    batch, length = tokens.shape
    queries = length if positions is None else positions.shape[1]
    rotate = rotation_of(model, length)
    variants = model.embed.W_E.new_empty(n_variants * len(layers), batch, queries, model.cfg.d_model)
    entered = 0
    for clean in clean_run(model, tokens):
        advance(variants[:entered], clean, rotate, positions)
        if clean.layer in layers:
            assert isinstance(clean, CleanExperts), f"layer {clean.layer} has no experts"
            variants[entered : entered + n_variants] = branch(clean)
            entered += n_variants
    losses = loss_at(model, variants, take(targets, positions)).unflatten(0, (len(layers), n_variants))
    return FanOut(losses, loss_at(model, clean.resid_post[None], targets)[0])


def clean_run(model: HookedMoE, tokens: Int[Tensor, "batch pos"]) -> Iterator[CleanBlock]:
    """The blocks of an ordinary forward over rows padded on the right only, one after another."""
    rotate = rotation_of(model, tokens.shape[1])
    resid = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        qkv = block.attn.project(block.ln1(resid), rotate)
        resid_mid = resid + block.attn.output(block.attn.attend(qkv, None))
        mlp_input = block.ln2(resid_mid)
        if isinstance(block.mlp, MoE):
            routing = block.mlp.route(mlp_input)
            outputs = block.mlp.run_experts(mlp_input, routing.indices)
            shared = block.mlp.run_shared(mlp_input)
            resid = resid_mid + plus(block.mlp.combine(outputs, routing.weights), shared)
            yield CleanExperts(layer, block, qkv, resid, block.mlp, resid_mid, mlp_input, routing, outputs, shared)
        else:
            resid = resid_mid + block.mlp(mlp_input)
            yield CleanBlock(layer, block, qkv, resid)


def advance(
    variants: Float[Tensor, "variant batch query d_model"],
    clean: CleanBlock,
    rotate: Rotation,
    positions: Int[Tensor, "batch query"] | None,
) -> None:
    """Take every variant through a block, in place, over the clean run's keys and values."""
    block = clean.block
    _, batch, queries, _ = variants.shape
    at_once = max(1, TOKENS_AT_ONCE // (batch * queries))
    for some in variants.split(at_once):
        count = len(some)
        here = rotate if positions is None else rotate.at(positions, count)
        x = some.flatten(0, 1)
        own = block.attn.project(block.ln1(x), here)
        q, k, v = (part.unflatten(0, (count, batch)) for part in own)
        z = prefix_attention(q, k, v, clean.qkv.k, clean.qkv.v, positions, block.attn.cfg.attention_scale)
        x = x + block.attn.output(z.flatten(0, 1))
        x = x + block.mlp(block.ln2(x))
        some.copy_(x.unflatten(0, (count, batch)))


def loss_at(
    model: HookedMoE, resid: Float[Tensor, "variant batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "variant batch pos"]:
    """Loss of final residual streams at their targets; nan where the target is -1."""
    losses = resid.new_full(resid.shape[:-1], float("nan"), dtype=torch.promote_types(resid.dtype, torch.float32))
    real = targets >= 0
    wanted, weight = targets[real], at_least_float32(model.unembed.W_U)
    for variant, loss in zip(resid, losses, strict=True):  # a variant at a time bounds the float32 copies
        loss[real] = target_loss(model.ln_final(at_least_float32(variant[real])), weight, wanted)
    return losses


def take(x: Shaped[Tensor, "batch pos *rest"], positions: Int[Tensor, "batch query"] | None) -> Tensor:
    """The rows of `x` at the queried positions."""
    return x if positions is None else x[torch.arange(len(x), device=x.device)[:, None], positions]


def rotation_of(model: HookedMoE, length: int) -> Rotation:
    """The rotation of positions 0 to length - 1."""
    positions = torch.arange(length, device=model.cfg.device)[None]
    return rotation(positions, model.cfg)
