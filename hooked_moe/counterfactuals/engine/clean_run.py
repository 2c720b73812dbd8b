"""The clean run, block by block, and all of it that variants need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_moe.components.attention import Attention, QueriesKeysValues
from hooked_moe.components.block import Block
from hooked_moe.components.moe import ExpertOutputs, MoE, Routing, combine_onto
from hooked_moe.components.rotary import Rotation, rotation
from hooked_moe.counterfactuals.engine.steps import Steps
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.transformer import Transformer

Clean = TypeVar("Clean", bound="CleanBlock")


@dataclass(frozen=True)
class CleanBlock:
    """What the clean run computed in one block."""

    layer: int
    block: Block
    qkv: QueriesKeysValues
    """At every position, whatever `at_positions` and `rows` pick of the rest."""
    resid_mid: Float[Tensor, "batch pos d_model"]
    mlp_input: Float[Tensor, "batch pos d_model"]
    resid_post: Float[Tensor, "batch pos d_model"]

    def rows(self: Clean, rows: Int[Tensor, " row"]) -> Clean:
        """The same for some batch rows, which may repeat."""
        return self._map(lambda x: x[rows])

    def at_positions(self: Clean, positions: Int[Tensor, "batch token"] | None) -> Clean:
        """The same at some positions only."""
        return self._map(lambda x: gather_positions(x, positions))

    def at_tokens(self: Clean, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"]) -> Clean:
        """The same at single tokens, each in a row of its own."""
        return self._map(lambda x: x[rows, positions][:, None])

    def at_window_starts(self: Clean, width: int) -> Clean:
        """The same at the first token of each window, where this is at the tokens of windows."""
        return self if width == 1 else self._map(lambda x: x[:, ::width])

    def _map(self: Clean, pick: Callable[[Tensor], Tensor]) -> Clean:
        return replace(self, **self._picked(pick))

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: pick(getattr(self, name)) for name in ("resid_mid", "mlp_input", "resid_post")}


@dataclass(frozen=True)
class CleanExperts(CleanBlock):
    """What it computed in a block with experts."""

    moe: MoE
    routing: Routing
    expert_outputs: ExpertOutputs
    shared_out: Float[Tensor, "batch pos d_model"] | None

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return super()._picked(pick) | {
            "routing": Routing(*map(pick, self.routing)),
            "expert_outputs": ExpertOutputs(self.expert_outputs.rows, pick(self.expert_outputs.place)),
            "shared_out": None if self.shared_out is None else pick(self.shared_out),
        }


def as_expert_block(clean: CleanBlock) -> CleanExperts:
    """The block as one with experts, which it must be."""
    assert isinstance(clean, CleanExperts), f"layer {clean.layer} has no experts"
    return clean


RunExperts = Callable[[MoE, Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos slot"], Scratch | None], ExpertOutputs]
"""How the experts of a block run: `MoE.run_experts`, or something that gives nearly the same."""
Attend = Callable[[Attention, QueriesKeysValues], Float[Tensor, "batch pos head d_value"]]


def attend_to_earlier(attn: Attention, qkv: QueriesKeysValues) -> Float[Tensor, "batch pos head d_value"]:
    """Every position sees all up to its own, in the layer's window."""
    return attn.attend(qkv, None)


def clean_block(
    block: Block,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    rotate: Rotation,
    attend: Attend = attend_to_earlier,
    run_experts: RunExperts = MoE.run_experts,
) -> CleanBlock:
    """One block of an ordinary forward over rows padded on the right only, and all that variants need of it."""
    qkv = block.attn.project(block.ln1(resid), rotate)
    resid_mid = resid + block.attn.output(attend(block.attn, qkv))
    return block_after_attention(layer, block, qkv, resid_mid, run_experts=run_experts)


def block_after_attention(
    layer: int,
    block: Block,
    qkv: QueriesKeysValues,
    resid_mid: Float[Tensor, "batch pos d_model"],
    scratch: Scratch | None = None,
    run_experts: RunExperts = MoE.run_experts,
) -> CleanBlock:
    """The rest of the block. Experts' outputs may lie in `scratch`, until that is used again."""
    mlp_input = block.ln2(resid_mid)
    if not isinstance(block.mlp, MoE):
        return CleanBlock(layer, block, qkv, resid_mid, mlp_input, resid_mid + block.mlp(mlp_input))
    routing = block.mlp.route(mlp_input)
    outputs = run_experts(block.mlp, mlp_input, routing.indices, scratch)
    shared = block.mlp.run_shared(mlp_input)
    resid_post = combine_onto(resid_mid, outputs, routing.weights[None], shared)[0]
    return CleanExperts(layer, block, qkv, resid_mid, mlp_input, resid_post, block.mlp, routing, outputs, shared)


def clean_blocks(
    model: Transformer, resid: Float[Tensor, "batch pos d_model"], visit: Callable[[CleanBlock], Any]
) -> Steps[Float[Tensor, "batch pos d_model"]]:
    """The clean run alone, from its embeddings: shows every block to `visit`, and returns the last residual stream."""
    rotate = rotation_of(model, resid.shape[1])
    for layer in range(model.cfg.n_layers):
        clean = clean_block(model.blocks[layer], layer, resid, rotate)
        resid = clean.resid_post
        visit(clean)
        del clean
        if layer + 1 < model.cfg.n_layers:
            yield
    return resid


def gather_positions(x: Shaped[Tensor, "batch pos *rest"], positions: Int[Tensor, "batch query"] | None) -> Tensor:
    """`x` at some positions of each row; None means all."""
    return x if positions is None else x[torch.arange(len(x), device=x.device)[:, None], positions]


def rotation_of(model: Transformer, length: int) -> Rotation:
    """The rotation of positions 0 to length - 1."""
    positions = torch.arange(length, device=model.cfg.device)[None]
    return rotation(positions, model.cfg)
