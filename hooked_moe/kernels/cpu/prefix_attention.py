"""Attention of variants on a CPU: the prefix that they share through torch's fused kernel, and what is their own beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_PER_PART, _QUERIES_PER_PART = 512, 64
"""So many rows at a time, of all variants of a few queries, look at the keys before those, and at no others: products of as many
rows run fast, and what queries do not see of their part's keys is little."""
_MASK_BYTES = 16 << 20
"""Of what hides keys from rows: fewer queries at a time where there are very many keys."""


def runs_fused(q: Tensor, values: Tensor) -> bool:
    """Whether torch's fused kernel for CPUs takes these."""
    return q.device.type == "cpu" and q.dtype in _FUSED_DTYPES and values.shape[-1] <= q.shape[-1]


def before_own(sliding_window: int | None, offset: int = 0) -> int | None:
    """How many positions before its window's start the token at an offset sees."""
    return None if sliding_window is None else max(0, sliding_window - 1 - offset)


def by_parts(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    width: int,
    scale: float,
    sink: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """The mix over the prefix, and over the tokens of the window, merged by the log-sum-exp of their scores."""
    own = (for_every_head(q, own_k), for_every_head(q, own_v))
    if width == 1:
        prefix = over_prefix(q, keys, values, starts, scale, before_own(sliding_window))
        return _token_by_parts(q, *own, *prefix, scale, sink)
    mixed, log_sum = _over_prefix_of_windows(q, keys, values, starts, width, scale, sliding_window)
    by_window = "variant batch (query offset) head e -> variant batch query head offset e"
    wide = torch.promote_types(q.dtype, torch.float32)
    own_q, own_k, own_v = (rearrange(x.to(wide), by_window, offset=width) for x in (q, *own))
    scores = own_q @ own_k.mT * scale
    reach = width if sliding_window is None else sliding_window
    seen = torch.ones(width, width, dtype=torch.bool, device=q.device).tril().triu(1 - reach)
    parts = [log_sum.unsqueeze(-1).to(wide), scores.masked_fill(~seen, -torch.inf)]
    if sink is not None:
        parts.append(sink.to(wide)[:, None, None].expand(*scores.shape[:-1], 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    z = weights[..., :1] * mixed.to(wide) + weights[..., 1 : 1 + width] @ own_v
    return rearrange(z, "variant batch query head offset e -> variant batch (query offset) head e").to(q.dtype)


def _token_by_parts(
    q: Tensor, own_k: Tensor, own_v: Tensor, mixed: Tensor, log_sum: Tensor, scale: float, sink: Tensor | None
) -> Tensor:
    """The softmax over prefix and own key splits exactly: with L the log-sum-exp of the prefix scores and s the own score, the
    prefix has weight sigmoid(L - s) (the merge of FlashAttention blocks, Dao et al. 2022); and all but the sink a has the share
    sigmoid(logaddexp(L, s) - a)."""
    wide = torch.promote_types(q.dtype, torch.float32)  # a weight rounded to half precision would be the largest error of all
    own_score = einsum(
        q.to(wide), own_k.to(wide), "variant batch query head e, variant batch query head e -> variant batch query head"
    )
    own_score = own_score * scale
    z = torch.lerp(own_v.to(wide), mixed.to(wide), (log_sum - own_score).sigmoid().unsqueeze(-1))
    if sink is not None:
        z = z * (torch.logaddexp(log_sum, own_score) - sink.to(wide)).sigmoid().unsqueeze(-1)
    return z.to(q.dtype)


def _over_prefix_of_windows(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, width: int, scale: float, sliding_window: int | None
) -> tuple[Float[Tensor, "variant batch query head offset d_value"], Float[Tensor, "variant batch query head offset"]]:
    """`over_prefix` for every token of a window. All share its prefix, so that each offset is but another set of variants; where
    there is a sliding window, each sees one position less than the one before."""
    if sliding_window is None:
        split = "variant batch (query offset) head e -> (variant offset) batch query head e"
        join = "(variant offset) batch query head ... -> variant batch query head offset ..."
        both = over_prefix(rearrange(q, split, offset=width), keys, values, starts, scale, None)
        mixed, log_sum = (rearrange(x, join, offset=width) for x in both)
        return mixed, log_sum
    by_offset = [
        over_prefix(q[:, :, offset::width], keys, values, starts, scale, before_own(sliding_window, offset))
        for offset in range(width)
    ]
    mixed, log_sum = (torch.stack(parts, dim=4) for parts in zip(*by_offset, strict=True))
    return mixed, log_sum


def over_prefix(
    q: Float[Tensor, "variant batch query head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    values: Float[Tensor, "batch pos kv_head d_value"],
    starts: Int[Tensor, "batch query"] | None,
    scale: float,
    reach: int | None,
) -> tuple[Float[Tensor, "variant batch query head d_value"], Float[Tensor, "variant batch query head"]]:
    """The mix over the strict prefix, or its last `reach` positions, and the log-sum-exp of its scores (minus infinity where it
    is empty).

    Flash attention, a sequence at a time. All variants of a query see the same keys: they are but more rows of one product with
    them, and so are heads that share a key/value head.
    """
    kv_heads, d_value = values.shape[2:]
    group = q.shape[3] // kv_heads
    q = rearrange(q, "variant batch query (kv_head group) e -> batch kv_head query (variant group) e", kv_head=kv_heads)
    values = F.pad(values, (0, q.shape[-1] - d_value))  # the kernel wants values as wide as keys
    mixed = torch.zeros_like(q)
    log_sum = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    for b, rows in enumerate(q):
        k, v = (rearrange(x[b], "pos head e -> 1 head pos e") for x in (keys, values))
        at, per_query = None if starts is None else starts[b], rows.shape[2]
        causal = starts is None and reach is None and per_query == 1
        parts = _strictly_before(rows.shape[1]) if causal else _parts(at, rows.shape[1], k.shape[2], per_query, reach, q.dtype)
        for queries, seen, mask in parts:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[None, :, queries].flatten(2, 3),
                k[:, :, seen],
                v[:, :, seen],
                is_causal=causal,
                attn_mask=mask,
                scale=scale,
            )
            mixed[b, :, queries] = out[0].unflatten(1, (-1, per_query))
            log_sum[b, :, queries] = lse[0].unflatten(1, (-1, per_query))
    by_head = "batch kv_head query (variant group) ... -> variant batch query (kv_head group) ..."
    return rearrange(mixed[..., :d_value], by_head, group=group), rearrange(log_sum, by_head, group=group)


Part = tuple[slice | Int[Tensor, " part"], slice, Float[Tensor, "1 1 row key"] | None]
"""Some queries; the keys in which their prefixes lie; and what hides the others of these from each of their rows, if anything."""


def _strictly_before(queries: int) -> Iterator[Part]:
    """All of them at once, shifted by one against the keys: a causal kernel then sees the strict prefix. Position 0 has none."""
    if queries > 1:
        yield slice(1, None), slice(0, queries - 1), None


def _parts(
    starts: Int[Tensor, " query"] | None, queries: int, length: int, per_query: int, reach: int | None, dtype: torch.dtype
) -> Iterator[Part]:
    """Those that have a prefix, a few at a time, with so many rows `per_query`."""
    starts = torch.arange(queries, device="cpu") if starts is None else starts
    firsts = torch.zeros_like(starts) if reach is None else (starts - reach).clamp(min=0)
    rows = min(_ROWS_PER_PART, _MASK_BYTES // max(1, length * dtype.itemsize))
    at_once = max(1, min(_QUERIES_PER_PART, rows // per_query))
    for part in (starts > firsts).nonzero().flatten().split(at_once):
        if not len(part):
            continue
        keys = slice(int(firsts[part].min()), min(length, int(starts[part].max())))
        key = torch.arange(keys.start, keys.stop, device="cpu")
        seen = (key < starts[part, None]) & (key >= firsts[part, None])
        mask = None
        if not seen.all():
            hidden = torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill_(~seen, -torch.inf)
            mask = hidden.repeat_interleave(per_query, dim=0)[None, None]
        first, last = int(part[0]), int(part[-1])
        consecutive = last - first + 1 == len(part)
        yield slice(first, last + 1) if consecutive else part, keys, mask


def for_every_head(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values of key/value heads, repeated for the query heads that share them."""
    group = q.shape[-2] // x.shape[-2]
    return x if group == 1 else x.repeat_interleave(group, dim=-2)
