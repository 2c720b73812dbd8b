"""Attention of counterfactual tokens: each sees the clean run strictly before its position, and itself.

A variant changes one token; all earlier keys and values are the clean run's. So the variants of a position share one prefix, and
no scores of all positions against all are ever held in memory. Heads that share a key/value head are but more queries of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.dispatch import by_operator
from hooked_moe.kernels.operators import operator

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefix_attention(
    q: Float[Tensor, "variant batch query head d_head"],
    own_k: Float[Tensor, "variant batch query kv_head d_head"],
    own_v: Float[Tensor, "variant batch query kv_head d_value"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    positions: Int[Tensor, "batch query"] | None,
    scale: float,
) -> Float[Tensor, "variant batch query head d_value"]:
    """Mix of `values[:, :t]` and the variant's own value, for each query at its position t.

    `positions` None means that queries are all positions in order, query t at position t.

    The softmax over prefix and own key splits exactly: with L the log-sum-exp of the prefix scores and s the own score, the
    prefix has weight sigmoid(L - s) (the merge of FlashAttention blocks, Dao et al. 2022).
    """
    mixed, log_sum = _over_prefix(q, keys, values, positions, scale)
    own_k, own_v = for_every_head(q, own_k), for_every_head(q, own_v)
    wide = torch.promote_types(q.dtype, torch.float32)  # a weight rounded to half precision would be the largest error of all
    own_score = einsum(
        q.to(wide), own_k.to(wide), "variant batch query head e, variant batch query head e -> variant batch query head"
    )
    prefix_weight = (log_sum - own_score * scale).sigmoid()
    return torch.lerp(own_v.to(wide), mixed.to(wide), prefix_weight.unsqueeze(-1)).to(q.dtype)


def window_attention(
    q: Float[Tensor, "variant batch token head d_head"],
    own_k: Float[Tensor, "variant batch token kv_head d_head"],
    own_v: Float[Tensor, "variant batch token kv_head d_value"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    width: int,
    scale: float,
) -> Float[Tensor, "variant batch token head d_value"]:
    """The same for windows of `width` tokens (token = query x offset): each sees the clean run strictly before the window, the
    window's tokens up to itself, and nothing else. `width` 1 is `prefix_attention`.
    """
    if by_operator(q):
        return _prefix_attention(q, own_k, own_v, keys, values, starts, width, scale)
    return _by_torch(q, own_k, own_v, keys, values, starts, width, scale)


def _by_torch(
    q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, width: int, scale: float
) -> Tensor:
    if width == 1:
        return prefix_attention(q, own_k, own_v, keys, values, starts, scale)
    # All tokens of a window share its prefix, so that each offset is but another set of variants.
    split = "variant batch (query offset) head e -> (variant offset) batch query head e"
    join = "(variant offset) batch query head ... -> variant batch query head offset ..."
    mixed, log_sum = _over_prefix(rearrange(q, split, offset=width), keys, values, starts, scale)
    mixed, log_sum = rearrange(mixed, join, offset=width), rearrange(log_sum, join, offset=width)
    by_window = "variant batch (query offset) head e -> variant batch query head offset e"
    wide = torch.promote_types(q.dtype, torch.float32)
    own = (q, for_every_head(q, own_k), for_every_head(q, own_v))
    own_q, own_k, own_v = (rearrange(x.to(wide), by_window, offset=width) for x in own)
    scores = own_q @ own_k.mT * scale
    later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, float("-inf"))
    weights = torch.cat((log_sum.unsqueeze(-1).to(wide), scores), dim=-1).softmax(-1)
    z = weights[..., :1] * mixed.to(wide) + weights[..., 1:] @ own_v
    return rearrange(z, "variant batch query head offset e -> variant batch (query offset) head e").to(q.dtype)


def own_share(
    q: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    scale: float,
) -> Float[Tensor, "batch pos head"]:
    """The attention that each position pays to itself, in causal attention over all positions up to it."""
    _, log_sum = _over_prefix(q[None], keys, values, None, scale)
    own_score = (q.to(log_sum.dtype) * for_every_head(q, keys).to(log_sum.dtype)).sum(-1)
    return (own_score * scale - log_sum[0]).sigmoid()


def for_every_head(q: Tensor, x: Tensor) -> Tensor:
    group = q.shape[-2] // x.shape[-2]
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


def _over_prefix(
    q: Float[Tensor, "variant batch query head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    positions: Int[Tensor, "batch query"] | None,
    scale: float,
) -> tuple[Float[Tensor, "variant batch query head d_value"], Float[Tensor, "variant batch query head"]]:
    """The mix over the strict prefix, and the log-sum-exp of its scores (minus infinity where there is none)."""
    kv_heads = keys.shape[2]
    group = q.shape[3] // kv_heads
    fused = q.device.type == "cpu" and q.dtype in _FUSED_DTYPES and values.shape[-1] <= q.shape[-1]
    over_prefix = _over_prefix_fused if fused else _over_prefix_spelled_out
    by_kv_head = rearrange(q, "variant batch query (kv_head group) e -> (variant group) batch query kv_head e", kv_head=kv_heads)
    mixed, log_sum = over_prefix(by_kv_head, keys, values, positions, scale)
    by_head = "(variant group) batch query kv_head ... -> variant batch query (kv_head group) ..."
    return rearrange(mixed, by_head, group=group), rearrange(log_sum, by_head, group=group)


def _over_prefix_fused(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention, a sequence at a time, its keys and values shared by all variants without a copy."""
    d_value = values.shape[-1]
    values = F.pad(values, (0, q.shape[-1] - d_value))  # the kernel wants values as wide as keys
    mixed = torch.zeros_like(q)
    log_sum = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    for b in range(q.shape[1]):
        rows = rearrange(q[:, b], "variant query head e -> variant head query e")
        k, v = (rearrange(x[b], "pos head e -> 1 head pos e").expand(len(rows), -1, -1, -1) for x in (keys, values))
        if positions is None:  # shifted by one against the keys, a causal kernel sees the strict prefix; position 0 has none
            if rows.shape[2] < 2:
                continue
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, scale=scale
            )
            mixed[:, b, 1:] = out.transpose(1, 2)
            log_sum[:, b, 1:] = lse.transpose(1, 2)
        else:
            some = positions[b] > 0
            before = torch.arange(k.shape[2], device=q.device) < positions[b][some][:, None]
            bias = torch.zeros(before.shape, dtype=q.dtype, device=q.device).masked_fill(~before, float("-inf"))
            if not len(bias):
                continue
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[:, :, some], k, v, attn_mask=bias[None, None], scale=scale
            )
            mixed[:, b, some] = out.transpose(1, 2)
            log_sum[:, b, some] = lse.transpose(1, 2)
    return mixed[..., :d_value], log_sum


def _over_prefix_spelled_out(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by its definition: the reference, and what runs where there is no fused kernel."""
    pos = torch.arange(keys.shape[1], device=q.device)
    at = pos[None] if positions is None else positions
    scores = einsum(q, keys, "variant batch query head e, batch pos head e -> variant batch query head pos") * scale
    scores = scores.masked_fill((pos >= at[..., None])[None, :, :, None, :], float("-inf"))
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.where(log_sum.isfinite(), 0.0).unsqueeze(-1)).exp()
    mixed = einsum(weights, values, "variant batch query head pos, batch pos head e -> variant batch query head e")
    return mixed, log_sum


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


def _definition(
    q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, width: int, scale: float
) -> Tensor:
    """The operator on a CPU: one softmax over all keys that a token sees, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_window = "variant batch (query offset) head e -> variant batch query offset head e"
    own_q, own_k, own_v = (rearrange(for_every_head(q, x).to(wide), by_window, offset=width) for x in (q, own_k, own_v))
    keys, values = (for_every_head(q, x).to(wide) for x in (keys, values))
    prefix = einsum(own_q, keys, "variant batch query offset head e, batch pos head e -> variant batch query offset head pos")
    own = einsum(
        own_q, own_k, "variant batch query offset head e, variant batch query own head e -> variant batch query offset head own"
    )
    pos, offset = (torch.arange(size, device=q.device) for size in (keys.shape[1], width))
    starts = pos[None, : q.shape[2] // width] if positions is None else positions
    prefix = prefix.masked_fill((pos >= starts[..., None])[None, :, :, None, None], float("-inf"))
    own = own.masked_fill((offset > offset[:, None])[:, None], float("-inf"))
    weights = (torch.cat((prefix, own), dim=-1) * scale).softmax(-1)
    before, within = weights.split((len(pos), width), dim=-1)
    out = einsum(before, values, "variant batch query offset head pos, batch pos head e -> variant batch query offset head e")
    out = out + einsum(
        within, own_v, "variant batch query offset head own, variant batch query own head e -> variant batch query offset head e"
    )
    return out.flatten(2, 3).to(q.dtype).contiguous()


_prefix_attention = operator(
    "prefix_attention",
    "(Tensor q, Tensor own_k, Tensor own_v, Tensor keys, Tensor values, Tensor? positions, int width, float scale) -> Tensor",
    definition=_definition,
    launch=_launch,
    shapes=_shapes,
)
