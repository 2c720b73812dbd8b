"""What a component of the corrupted run does when its input alone has changed."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.pairs import PromptPair
from hooked_moe.components.moe import ExpertOutputs

HEAD_INPUTS = {"head": "qkv", "head_q": "q", "head_k": "k", "head_v": "v"}
RECEIVERS = ("router", "expert", *HEAD_INPUTS, "logits")


def received(pair: PromptPair, receiver: Any, delta: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """The last residual stream of the corrupted run when the receiver alone reads `delta` besides."""
    if receiver == "logits":
        return pair.resid_post("corrupt") + delta
    kind, layer, *number = receiver
    if kind in HEAD_INPUTS:
        mid = pair.resid_mid("corrupt", layer) + _of_head(pair, layer, number[0], HEAD_INPUTS[kind], delta)
        block = pair.model.blocks[layer]
        after = mid + block.mlp(block.ln2(mid))
    else:
        change = _of_router(pair, layer, delta) if kind == "router" else _of_expert(pair, layer, number[0], delta)
        after = pair.resid_post("corrupt", layer) + change
    return pair.model(after, start_at_layer=layer + 1, stop_at_layer=pair.model.cfg.n_layers, attention_mask=pair.attention_mask)


def _mlp_input(pair: PromptPair, layer: int, delta: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    return pair.model.blocks[layer].ln2(pair.resid_mid("corrupt", layer) + delta)


def _of_router(pair: PromptPair, layer: int, delta: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Tokens are routed by the changed stream; the experts read the old one."""
    moe, corrupt = pair.moe(layer), pair.experts("corrupt", layer)
    new = moe.route(_mlp_input(pair, layer, delta))
    outputs = moe.run_experts(pair.mlp_input("corrupt", layer), new.indices)
    return moe.combine(outputs, new.weights) - moe.combine(ExpertOutputs.of_slots(corrupt.outputs), corrupt.weights)


def _of_expert(
    pair: PromptPair, layer: int, expert: int, delta: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """One expert reads the changed stream, at its old weight."""
    corrupt = pair.experts("corrupt", layer)
    changed = pair.moe(layer).run_experts(_mlp_input(pair, layer, delta), corrupt.indices).in_slots()
    weights = corrupt.weights * (corrupt.indices == expert)
    return (weights.unsqueeze(-1) * (changed - corrupt.outputs)).sum(2)


def _of_head(
    pair: PromptPair, layer: int, head: int, inputs: str, delta: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What one head writes besides, when its queries, keys or values are made of the changed stream."""
    model, resid, prefix = pair.model, pair.resid_pre("corrupt", layer), f"blocks.{layer}.attn."
    names = [prefix + {"q": "hook_rot_q", "k": "hook_rot_k", "v": "hook_v"}[name] for name in inputs]
    block: dict[str, Any] = {"start_at_layer": layer, "stop_at_layer": layer + 1, "attention_mask": pair.attention_mask}
    _, changed = model.run_with_cache(resid + delta, names_filter=names, **block)
    with model.hooks([(name, lambda x, hook: changed[hook.name].clone()) for name in names]):
        _, mixed = model.run_with_cache(resid, names_filter=prefix + "hook_z", **block)
    change = mixed[prefix + "hook_z"][..., head, :] - pair.z("corrupt", layer)[..., head, :]
    return change @ model.blocks[layer].attn.W_O[:, head].T
