"""Causal self-attention: what its kinds share, the mix of values and the way back into the residual stream."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_moe.components.key_value_cache import LayerCache
from hooked_moe.components.precision import at_least_float32
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.hooks.hook_point import HookPoint, keep_unedited_bits
from hooked_moe.kernels.cpu.few_rows import linear


class QueriesKeysValues(NamedTuple):
    q: Float[Tensor, "batch pos head d_head"]
    k: Float[Tensor, "batch key_pos kv_head d_head"]
    v: Float[Tensor, "batch key_pos kv_head d_value"]


class Attention(nn.Module):
    """Subclasses say how queries, keys and values come about (`project`).

    Weights keep the orientation of the checkpoint, [out, in]. Products with them are spelled as `linear` over views: of an
    einsum torch makes a batch of one matrix, for which oneDNN copies a weight in half precision.
    """

    def __init__(self, cfg: HookedMoEConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.window = cfg.window_of(layer)
        """How many positions up to its own a token sees; None: all."""
        self.sink = nn.Parameter(torch.empty(cfg.n_heads)) if cfg.attention_sink else None
        if self.sink is not None:
            self.hook_attn_sink = HookPoint()
        self.W_O = nn.Parameter(torch.empty(cfg.d_model, cfg.n_heads, cfg.value_width))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model)) if cfg.output_bias else None
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rotate: Rotation,
        visible: Bool[Tensor, "batch 1 query key"] | None = None,
        past: LayerCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """`visible` says which keys a query may see; None means all up to its own, in the layer's window if it has one. `past`
        holds earlier keys and values."""
        q, k, v = self.project(x, rotate)
        if past is not None:
            k, v = past.extend(k, v)
        return self.output(self.attend(QueriesKeysValues(q, k, v), visible))

    def project(self, x: Float[Tensor, "batch pos d_model"], rotate: Rotation) -> QueriesKeysValues:
        """Queries, keys and values as attention uses them."""
        raise NotImplementedError

    def attend(
        self, qkv: QueriesKeysValues, visible: Bool[Tensor, "batch 1 query key"] | None
    ) -> Float[Tensor, "batch pos head d_value"]:
        """Mix values by attention: a fused kernel, or the pattern itself where a hook looks at it."""
        q, k, v = (x.transpose(1, 2) for x in qkv)  # [batch, head, pos, width]
        if visible is None and self.window is not None and self.window < k.shape[2]:
            visible = _last_keys(k.shape[2], self.window, q.device)
        sink = self._sinks(q)
        z = _fused(q, k, v, visible, self.cfg.attention_scale, sink)
        if self.hook_attn_scores.active or self.hook_pattern.active:
            z = self._attend_by_pattern(z, q, k, v, visible, sink)
        return self.hook_z(z.transpose(1, 2))

    def _sinks(self, q: Tensor) -> Float[Tensor, "batch head query"] | None:
        """The sink of every query, if there are sinks."""
        if self.sink is None:
            return None
        sink = self.sink.expand(q.shape[0], q.shape[2], -1)
        if self.hook_attn_sink.active:
            sink = self.hook_attn_sink(sink.clone())
        return sink.transpose(1, 2)

    def _attend_by_pattern(
        self, fused: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if visible is None:
            hidden = _later_keys(q.shape[2], k.shape[2], q.dtype, q.device)
        else:
            hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, float("-inf"))
            hidden = hidden.expand(*q.shape[:3], k.shape[2]).flatten(0, 1)
        product = torch.baddbmm(  # scale * q k + hidden, in one pass over the scores
            hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=self.cfg.attention_scale
        )
        scores = product.unflatten(0, q.shape[:2])
        pattern = _softmax(scores, sink)
        seen = self.hook_attn_scores(scores)
        edited = self.hook_pattern(_softmax(seen, sink) if self.hook_attn_scores.may_edit else pattern)
        if not (self.hook_attn_scores.may_edit or self.hook_pattern.may_edit):
            return fused
        z = einsum(edited, v, "batch head query key, batch head key e -> batch head query e")
        return keep_unedited_bits(z, fused, same=(edited == pattern).all(dim=-1, keepdim=True))

    def output(self, z: Float[Tensor, "batch pos head d_value"]) -> Float[Tensor, "batch pos d_model"]:
        """The heads' outputs, summed in the residual stream."""
        out = linear(z.flatten(-2), self.W_O.flatten(-2))
        if self.hook_result.active:
            result = einsum(z, self.W_O, "batch pos head d_value, d_model head d_value -> batch pos head d_model")
            edited = self.hook_result(result)
            if self.hook_result.may_edit:
                same = (edited == result).all(dim=-1).all(dim=-1, keepdim=True)
                out = keep_unedited_bits(edited.sum(dim=2), out, same)
        return out if self.b_O is None else out + self.b_O


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, sink: Tensor | None) -> Tensor:
    """torch's fused attention, over [batch head pos width].

    A sink is one more key, the first, whose value is zero. Its product with a query has to be the sink of that query: so queries
    are wider by the sink, keys by zero, and that key is one there.
    """
    d_value = v.shape[-1]
    if sink is not None:
        visible = _last_keys(k.shape[2], k.shape[2], q.device) if visible is None else visible
        visible = F.pad(visible, (1, 0), value=True)
        q = torch.cat((q, F.pad(sink.unsqueeze(-1) / scale, (0, _MORE_COLUMNS - 1)).to(q.dtype)), dim=-1)
        of_sink = F.pad(k.new_ones(1), (k.shape[-1], _MORE_COLUMNS - 1))
        k = torch.cat((of_sink.expand(*k.shape[:2], 1, -1), F.pad(k, (0, _MORE_COLUMNS))), dim=2)
        v = F.pad(v, (0, 0, 1, 0))
    narrower = max(0, q.shape[-1] - d_value)  # fused kernels want values as wide as keys; a column of zeros costs little
    v = F.pad(v, (0, narrower)) if narrower else v
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True)
    return z[..., :d_value]


_MORE_COLUMNS = 8
"""By which heads with a sink are wider: one would do, but kernels for GPUs want multiples of it."""


@lru_cache(maxsize=2)  # all layers ask for the same ones
def _last_keys(length: int, window: int, device: torch.device) -> Bool[Tensor, "1 1 query key"]:
    """Which keys a query sees: the last `window` up to its own."""
    with torch.inference_mode(False):
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


@lru_cache(maxsize=1)  # all layers ask for the same one
def _later_keys(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "query key"]:
    """Minus infinity for every key after its query, zero for the others; queries and keys both begin at position 0."""
    with torch.inference_mode(False):  # so that any mode can use what another made
        return torch.full((queries, keys), float("-inf"), dtype=dtype, device=device).triu_(1)


def project_heads(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Float[Tensor, "batch pos head width"]:
    """`weight` is [head, width, d_in], `bias` [head, width]."""
    out = linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2])


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Over the keys, and a sink beside them, whose share is left out."""
    wide = at_least_float32(scores)
    if sink is not None:
        wide = torch.cat((wide, sink.unsqueeze(-1).to(wide.dtype)), dim=-1)
    return wide.softmax(dim=-1)[..., : scores.shape[-1]].to(scores.dtype)
