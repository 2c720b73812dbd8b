"""Gradients of a metric at the corrupted run's residual streams, from one forward and one backward pass for all of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.metrics import differentiable_value
from hooked_moe.circuits.pairs import PromptPair
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.hooks.hook_point import HookPoint

Gradients = dict[int, Float[Tensor, "batch pos d_model"]]
"""By layer."""


def residual_gradients(pair: PromptPair, metric: Any, where: Literal["mid", "post"] = "post") -> Gradients:
    """d metric / d (residual stream after each block, or between attention and experts), in the corrupted run.

    What is added to the stream there has the same gradient: the routed output, or what heads write.
    """
    after, between = block_gradients(pair, metric)
    return after if where == "post" else between


def block_gradients(pair: PromptPair, metric: Any, dropped: int | None = None) -> tuple[Gradients, Gradients]:
    """Those after every block and those between its attention and its experts. Nothing goes back through what the `dropped`
    block writes: the stream passes it by."""
    streams: dict[str, Tensor] = {}
    n_layers = pair.model.cfg.n_layers
    names = {where: [f"blocks.{layer}.hook_resid_{where}" for layer in range(n_layers)] for where in ("post", "mid")}

    def keep(x: Tensor, hook: HookPoint) -> None:
        streams[str(hook.name)] = x

    def cut(x: Tensor, hook: HookPoint) -> Tensor:
        return x.detach()

    hooks = [(name, keep) for name in (*names["post"], *names["mid"])]
    cuts = [] if dropped is None else [(f"blocks.{dropped}.hook_{part}_out", cut) for part in ("attn", "mlp")]
    embed = pair.activations("corrupt")["hook_embed"].detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad(), pair.model.hooks([*hooks, *cuts]):
        final = pair.model(embed, start_at_layer=0, stop_at_layer=n_layers, attention_mask=pair.attention_mask)
        value = differentiable_value(pair, metric, final)
        found = dict(zip(streams, torch.autograd.grad(value, list(streams.values())), strict=True))
    after, between = ({layer: found[name] for layer, name in enumerate(names[where])} for where in ("post", "mid"))
    return after, between


def direct_gradients(pair: PromptPair, metric: Any) -> Float[Tensor, "batch pos d_model"]:
    """What the logit difference is multiplied by at the position that is read, the final norm's scale held fixed; 0 elsewhere."""
    packed = pack(pair.tokens, pair.attention_mask)
    final = at_least_float32(pair.resid_post("corrupt"))
    scale = (final.square().mean(-1, keepdim=True) + pair.model.ln_final.eps).sqrt()
    along = metric.readout.direction(pair.model, packed.rows)[:, None] * at_least_float32(pair.model.ln_final.w) / scale
    read = torch.zeros_like(pair.tokens).scatter_(1, metric.original_positions(packed)[:, None], 1)
    return along * read[..., None]


def along(
    delta: Float[Tensor, "batch pos slot d_model"], gradient: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos slot"]:
    """The first order of every change."""
    return (at_least_float32(delta) * at_least_float32(gradient).unsqueeze(2)).sum(-1)
