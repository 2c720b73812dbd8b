"""Attention of counterfactual tokens: each sees the clean run strictly before its position, and itself.

A variant changes one token, or a window of tokens; all earlier keys and values are the clean run's. So the variants of a position
share one prefix, and no scores of all positions against all are ever held in memory. In a layer with a sliding window, the prefix
is the part of it that a token sees: a change reaches later positions only, so nothing else differs.

It is defined once, in `window_attention_reference`. On a CPU, `cpu/prefix_attention.py` takes the shared prefix through
torch's fused kernel; on a CUDA device, the operator runs a kernel of this package.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cpu.prefix_attention import before_own, by_parts, for_every_head, over_prefix, runs_fused
from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator


def window_attention(
    q: Float[Tensor, "variant batch token head d_head"],
    own_k: Float[Tensor, "variant batch token kv_head d_head"],
    own_v: Float[Tensor, "variant batch token kv_head d_value"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    width: int,
    scale: float,
    *,
    sink: Float[Tensor, " head"] | None = None,
    sliding_window: int | None = None,
) -> Float[Tensor, "variant batch token head d_value"]:
    """Attention in windows of `width` tokens (token = query x offset): each token sees the clean run strictly before its window,
    the window's tokens up to itself, and nothing else. With `width` 1 it sees what is before its own position, and itself.

    `starts` None means that windows start at all positions in order. `sink` is a logit of each head that takes a share of the
    attention; `sliding_window` the number of positions up to its own that a token sees at most.
    """
    form = window_attention_reference
    if use_kernels(q):
        form = _prefix_attention
    elif runs_fused(q, values):
        form = by_parts
    return form(q, own_k, own_v, keys, values, starts, width, scale, sink, sliding_window)


def window_attention_reference(
    q: Float[Tensor, "variant batch token head d_head"],
    own_k: Float[Tensor, "variant batch token kv_head d_head"],
    own_v: Float[Tensor, "variant batch token kv_head d_value"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    width: int,
    scale: float,
    sink: Float[Tensor, " head"] | None = None,
    sliding_window: int | None = None,
) -> Float[Tensor, "variant batch token head d_value"]:
    """The definition: one softmax over all keys that a token sees, and its sink, in float32 or wider."""
    before, within = _weights(q, own_k, keys, starts, width, scale, sink, sliding_window)
    values, own_v = (for_every_head(q, x).to(before.dtype) for x in (values, own_v))
    own_v = own_v.unflatten(2, (-1, width))
    mixed = einsum(before, values, "variant batch query offset head pos, batch pos head e -> variant batch query offset head e")
    mixed = mixed + einsum(
        within, own_v, "variant batch query offset head own, variant batch query own head e -> variant batch query offset head e"
    )
    return mixed.flatten(2, 3).to(q.dtype).contiguous()


def _weights(
    q: Tensor,
    own_k: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    width: int,
    scale: float,
    sink: Tensor | None,
    sliding_window: int | None,
) -> tuple[Float[Tensor, "variant batch query offset head pos"], Float[Tensor, "variant batch query offset head own"]]:
    """How much attention each token pays to the clean run, and to the tokens of its window."""
    wide = torch.promote_types(q.dtype, torch.float32)
    own_q, own_k = (for_every_head(q, x).to(wide).unflatten(2, (-1, width)) for x in (q, own_k))
    keys = for_every_head(q, keys).to(wide)
    prefix = einsum(own_q, keys, "variant batch query offset head e, batch pos head e -> variant batch query offset head pos")
    own = einsum(
        own_q, own_k, "variant batch query offset head e, variant batch query own head e -> variant batch query offset head own"
    )
    pos, offset = (torch.arange(size, device=q.device) for size in (keys.shape[1], width))
    at = (pos[None, : q.shape[2] // width] if starts is None else starts)[..., None, None]
    reach = keys.shape[1] + width if sliding_window is None else sliding_window
    unseen = (pos >= at) | (pos <= at + offset[:, None] - reach)
    unseen_own = (offset > offset[:, None]) | (offset <= offset[:, None] - reach)
    scores = torch.cat(
        (prefix.masked_fill(unseen[:, :, :, None], -torch.inf), own.masked_fill(unseen_own[:, None], -torch.inf)), -1
    )
    scores = scores * scale
    if sink is not None:
        scores = torch.cat((scores, sink.to(wide)[:, None].expand(*scores.shape[:-1], 1)), dim=-1)
    before, within = scores.softmax(-1)[..., : len(pos) + width].split((len(pos), width), dim=-1)
    return before, within


def own_share(
    q: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    scale: float,
    sink: Float[Tensor, " head"] | None = None,
    sliding_window: int | None = None,
) -> Float[Tensor, "batch pos head"]:
    """The attention that each position pays to itself, in causal attention over all positions up to it."""
    if not runs_fused(q, values):
        return _weights(q[None], keys[None], keys, None, 1, scale, sink, sliding_window)[1][0, :, :, 0, :, 0]
    _, log_sum = over_prefix(q[None], keys, values, None, scale, before_own(sliding_window))
    own_score = (q.to(log_sum.dtype) * for_every_head(q, keys).to(log_sum.dtype)).sum(-1)
    rest = log_sum[0] if sink is None else torch.logaddexp(log_sum[0], sink.to(log_sum.dtype))
    return (own_score * scale - rest).sigmoid()


# --- the operator ------------------------------------------------------------------------------------------------------------


def _launch(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    width: int,
    scale: float,
    sink: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    q, own_k, own_v, keys, values = (x.contiguous() for x in (q, own_k, own_v, keys, values))
    variants, batch, tokens, heads, _ = q.shape
    _, length, kv_heads, d_value = values.shape
    out = q.new_empty(*q.shape[:-1], d_value)
    sizes = {"variants": variants, "batch": batch, "queries": tokens // width, "width": width, "kv_heads": kv_heads}
    sizes["group"] = heads // kv_heads
    launch = launches.prefix_attention(**sizes, head_width=q.shape[-1], value_width=d_value, dtype=q.dtype)
    positions, sink = (None if x is None else x.contiguous() for x in (positions, sink))
    sink, reach = None if sink is None else sink.float(), sliding_window or 0
    nvrtc.run(launch, out, q, own_k, own_v, keys, values, positions, sink, *sizes.values(), length, reach, float(scale))
    return out


def _shapes(q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], values.shape[-1])


_prefix_attention = operator(
    "prefix_attention",
    "(Tensor q, Tensor own_k, Tensor own_v, Tensor keys, Tensor values, Tensor? positions, int width, float scale, Tensor? sink, "
    "int? sliding_window) -> Tensor",
    definition=window_attention_reference,
    launch=_launch,
    shapes=_shapes,
)
