"""Attention of counterfactual tokens: each sees the clean run strictly before its position, and itself.

A variant changes one token, or a window of tokens; all earlier keys and values are the clean run's. So the variants of a position
share one prefix, and no scores of all positions against all are ever held in memory.

It is defined once, in `window_attention_reference`. On a CPU, `_by_parts` takes the shared prefix through torch's fused kernel;
on a CUDA device, the operator runs a kernel of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.operators import operator

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    `starts` None means that windows start at all positions in order. `sink`, a logit of each head that takes a share of the
    attention, and `sliding_window`, the number of positions that a token sees, are not implemented yet: `ValueError`.
    """
    if sink is not None or sliding_window is not None:
        raise ValueError("sinks and sliding windows are not implemented yet in attention of variants: pass None for both")
    if use_kernels(q):
        return _prefix_attention(q, own_k, own_v, keys, values, starts, width, scale)
    form = _by_parts if _runs_fused(q, values) else window_attention_reference
    return form(q, own_k, own_v, keys, values, starts, width, scale)


def window_attention_reference(
    q: Float[Tensor, "variant batch token head d_head"],
    own_k: Float[Tensor, "variant batch token kv_head d_head"],
    own_v: Float[Tensor, "variant batch token kv_head d_value"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    width: int,
    scale: float,
) -> Float[Tensor, "variant batch token head d_value"]:
    """The definition: one softmax over all keys that a token sees, in float32 or wider."""
    before, within = _weights(q, own_k, keys, starts, width, scale)
    values, own_v = (for_every_head(q, x).to(before.dtype) for x in (values, own_v))
    own_v = own_v.unflatten(2, (-1, width))
    mixed = einsum(before, values, "variant batch query offset head pos, batch pos head e -> variant batch query offset head e")
    mixed = mixed + einsum(
        within, own_v, "variant batch query offset head own, variant batch query own head e -> variant batch query offset head e"
    )
    return mixed.flatten(2, 3).to(q.dtype).contiguous()


def _weights(
    q: Tensor, own_k: Tensor, keys: Tensor, starts: Tensor | None, width: int, scale: float
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
    at = pos[None, : q.shape[2] // width] if starts is None else starts
    prefix = prefix.masked_fill((pos >= at[..., None])[None, :, :, None, None], float("-inf"))
    own = own.masked_fill((offset > offset[:, None])[:, None], float("-inf"))
    before, within = (torch.cat((prefix, own), dim=-1) * scale).softmax(-1).split((len(pos), width), dim=-1)
    return before, within


def own_share(
    q: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    scale: float,
) -> Float[Tensor, "batch pos head"]:
    """The attention that each position pays to itself, in causal attention over all positions up to it."""
    if not _runs_fused(q, values):
        return _weights(q[None], keys[None], keys, None, 1, scale)[1][0, :, :, 0, :, 0]
    _, log_sum = _over_prefix(q[None], keys, values, None, scale)
    own_score = (q.to(log_sum.dtype) * for_every_head(q, keys).to(log_sum.dtype)).sum(-1)
    return (own_score * scale - log_sum[0]).sigmoid()


def for_every_head(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values of key/value heads, repeated for the query heads that share them."""
    group = q.shape[-2] // x.shape[-2]
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


# --- the fast form on a CPU --------------------------------------------------------------------------------------------------


def _runs_fused(q: Tensor, values: Tensor) -> bool:
    """Whether torch's fused kernel for CPUs takes these."""
    return q.device.type == "cpu" and q.dtype in _FUSED_DTYPES and values.shape[-1] <= q.shape[-1]


def _by_parts(
    q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, width: int, scale: float
) -> Tensor:
    """The mix over the prefix, and over the tokens of the window, merged by the log-sum-exp of their scores."""
    own = (for_every_head(q, own_k), for_every_head(q, own_v))
    if width == 1:
        return _token_by_parts(q, *own, *_over_prefix(q, keys, values, starts, scale), scale)
    # All tokens of a window share its prefix, so that each offset is but another set of variants.
    split = "variant batch (query offset) head e -> (variant offset) batch query head e"
    join = "(variant offset) batch query head ... -> variant batch query head offset ..."
    over_prefix = _over_prefix(rearrange(q, split, offset=width), keys, values, starts, scale)
    mixed, log_sum = (rearrange(x, join, offset=width) for x in over_prefix)
    by_window = "variant batch (query offset) head e -> variant batch query head offset e"
    wide = torch.promote_types(q.dtype, torch.float32)
    own_q, own_k, own_v = (rearrange(x.to(wide), by_window, offset=width) for x in (q, *own))
    scores = own_q @ own_k.mT * scale
    later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, float("-inf"))
    weights = torch.cat((log_sum.unsqueeze(-1).to(wide), scores), dim=-1).softmax(-1)
    z = weights[..., :1] * mixed.to(wide) + weights[..., 1:] @ own_v
    return rearrange(z, "variant batch query head offset e -> variant batch (query offset) head e").to(q.dtype)


def _token_by_parts(q: Tensor, own_k: Tensor, own_v: Tensor, mixed: Tensor, log_sum: Tensor, scale: float) -> Tensor:
    """The softmax over prefix and own key splits exactly: with L the log-sum-exp of the prefix scores and s the own score, the
    prefix has weight sigmoid(L - s) (the merge of FlashAttention blocks, Dao et al. 2022)."""
    wide = torch.promote_types(q.dtype, torch.float32)  # a weight rounded to half precision would be the largest error of all
    own_score = einsum(
        q.to(wide), own_k.to(wide), "variant batch query head e, variant batch query head e -> variant batch query head"
    )
    prefix_weight = (log_sum - own_score * scale).sigmoid()
    return torch.lerp(own_v.to(wide), mixed.to(wide), prefix_weight.unsqueeze(-1)).to(q.dtype)


def _over_prefix(
    q: Float[Tensor, "variant batch query head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    scale: float,
) -> tuple[Float[Tensor, "variant batch query head d_value"], Float[Tensor, "variant batch query head"]]:
    """The mix over the strict prefix, and the log-sum-exp of its scores (minus infinity where there is none).

    Flash attention, a sequence at a time, its keys and values shared by all variants without a copy. Heads that share a key/value
    head are but more queries of it.
    """
    kv_heads, d_value = values.shape[2:]
    group = q.shape[3] // kv_heads
    q = rearrange(q, "variant batch query (kv_head group) e -> (variant group) batch query kv_head e", kv_head=kv_heads)
    values = F.pad(values, (0, q.shape[-1] - d_value))  # the kernel wants values as wide as keys
    mixed = torch.zeros_like(q)
    log_sum = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    for b in range(q.shape[1]):
        rows = rearrange(q[:, b], "variant query head e -> variant head query e")
        k, v = (rearrange(x[b], "pos head e -> 1 head pos e").expand(len(rows), -1, -1, -1) for x in (keys, values))
        if starts is None:  # shifted by one against the keys, a causal kernel sees the strict prefix; position 0 has none
            if rows.shape[2] < 2:
                continue
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, scale=scale
            )
            mixed[:, b, 1:] = out.transpose(1, 2)
            log_sum[:, b, 1:] = lse.transpose(1, 2)
        else:
            has_prefix = starts[b] > 0
            before = torch.arange(k.shape[2], device=q.device) < starts[b][has_prefix][:, None]
            bias = torch.zeros(before.shape, dtype=q.dtype, device=q.device).masked_fill(~before, float("-inf"))
            if not len(bias):
                continue
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[:, :, has_prefix], k, v, attn_mask=bias[None, None], scale=scale
            )
            mixed[:, b, has_prefix] = out.transpose(1, 2)
            log_sum[:, b, has_prefix] = lse.transpose(1, 2)
    by_head = "(variant group) batch query kv_head ... -> variant batch query (kv_head group) ..."
    return rearrange(mixed[..., :d_value], by_head, group=group), rearrange(log_sum, by_head, group=group)


# --- the operator ------------------------------------------------------------------------------------------------------------


def _launch(
    q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, width: int, scale: float
) -> Tensor:
    q, own_k, own_v, keys, values = (x.contiguous() for x in (q, own_k, own_v, keys, values))
    variants, batch, tokens, heads, _ = q.shape
    _, length, kv_heads, d_value = values.shape
    out = q.new_empty(*q.shape[:-1], d_value)
    sizes = {"variants": variants, "batch": batch, "queries": tokens // width, "width": width, "kv_heads": kv_heads}
    sizes["group"] = heads // kv_heads
    launch = launches.prefix_attention(**sizes, head_width=q.shape[-1], value_width=d_value, dtype=q.dtype)
    positions = None if positions is None else positions.contiguous()
    nvrtc.run(launch, out, q, own_k, own_v, keys, values, positions, *sizes.values(), length, float(scale))
    return out


def _shapes(
    q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, width: int, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:-1], values.shape[-1])


_prefix_attention = operator(
    "prefix_attention",
    "(Tensor q, Tensor own_k, Tensor own_v, Tensor keys, Tensor values, Tensor? positions, int width, float scale) -> Tensor",
    definition=window_attention_reference,
    launch=_launch,
    shapes=_shapes,
)
