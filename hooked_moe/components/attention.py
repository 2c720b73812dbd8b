"""Causal self-attention with rotary positions, grouped key/value heads, and optional norm and clipping of q and k."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_moe.components.norm import RMSNorm, at_least_float32
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.hook_points import HookPoint


class QueriesKeysValues(NamedTuple):
    q: Float[Tensor, "batch pos head d_head"]
    k: Float[Tensor, "batch pos kv_head d_head"]
    v: Float[Tensor, "batch pos kv_head d_head"]


class Attention(nn.Module):
    """Weights keep the orientation of the checkpoint, [out, in], so that every einsum is one product over a view."""

    def __init__(self, cfg: HookedMoEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        h, kv, e, d = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_model
        self.W_Q = nn.Parameter(torch.empty(h, e, d))
        self.W_K = nn.Parameter(torch.empty(kv, e, d))
        self.W_V = nn.Parameter(torch.empty(kv, e, d))
        self.W_O = nn.Parameter(torch.empty(d, h, e))
        self.b_Q = nn.Parameter(torch.zeros(h, e)) if cfg.attention_bias else None
        self.b_K = nn.Parameter(torch.zeros(kv, e)) if cfg.attention_bias else None
        self.b_V = nn.Parameter(torch.zeros(kv, e)) if cfg.attention_bias else None
        self.b_O = nn.Parameter(torch.zeros(d)) if cfg.attention_bias else None
        self.q_norm = RMSNorm(h * e, cfg.eps, hooked=False) if cfg.qk_norm == "full" else None
        self.k_norm = RMSNorm(kv * e, cfg.eps, hooked=False) if cfg.qk_norm == "full" else None

        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rotate: Rotation,
        visible: Bool[Tensor, "batch 1 query key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """`visible` says which keys a query may see; None means all up to its own."""
        return self.output(self.attend(self.project(x, rotate), visible))

    def project(self, x: Float[Tensor, "batch pos d_model"], rotate: Rotation) -> QueriesKeysValues:
        """Queries, keys and values as attention uses them: projected, normalised, clipped, rotated."""
        q = self.hook_q(_project(x, self.W_Q, self.b_Q))
        k = self.hook_k(_project(x, self.W_K, self.b_K))
        v = self.hook_v(_project(x, self.W_V, self.b_V))
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.flatten(-2)).unflatten(-1, q.shape[-2:])
            k = self.k_norm(k.flatten(-2)).unflatten(-1, k.shape[-2:])
        if self.cfg.clip_qkv is not None:
            q, k, v = (x.clamp(-self.cfg.clip_qkv, self.cfg.clip_qkv) for x in (q, k, v))
        return QueriesKeysValues(self.hook_rot_q(rotate(q)), self.hook_rot_k(rotate(k)), v)

    def attend(
        self, qkv: QueriesKeysValues, visible: Bool[Tensor, "batch 1 query key"] | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Mix values by attention: a fused kernel, or the pattern itself where a hook looks at it."""
        q, k, v = (rearrange(x, "batch pos head d_head -> batch head pos d_head") for x in qkv)
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.cfg.attention_scale, enable_gqa=True
        )
        if self.hook_attn_scores.active or self.hook_pattern.active:
            z = self._attend_by_pattern(z, q, k, v, visible)
        return self.hook_z(rearrange(z, "batch head pos d_head -> batch pos head d_head"))

    def _attend_by_pattern(self, fused: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = einsum(q, k, "batch head query e, batch head key e -> batch head query key") * self.cfg.attention_scale
        scores = scores.masked_fill(~visible, float("-inf"))
        pattern = _softmax(scores)
        edited = _softmax(self.hook_attn_scores(scores)) if self.hook_attn_scores.active else pattern
        edited = self.hook_pattern(edited)
        z = einsum(edited, v, "batch head query key, batch head key e -> batch head query e")
        return keep_unedited_bits(z, fused, same=(edited == pattern).all(dim=-1, keepdim=True))

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """The heads' outputs, summed in the residual stream."""
        out = einsum(z, self.W_O, "batch pos head d_head, d_model head d_head -> batch pos d_model")
        if self.hook_result.active:
            result = einsum(z, self.W_O, "batch pos head d_head, d_model head d_head -> batch pos head d_model")
            edited = self.hook_result(result)
            same = (edited == result).all(dim=-1).all(dim=-1, keepdim=True)
            out = keep_unedited_bits(edited.sum(dim=2), out, same)
        return out if self.b_O is None else out + self.b_O


def _softmax(scores: Tensor) -> Tensor:
    return at_least_float32(scores).softmax(dim=-1).to(scores.dtype)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = einsum(x, weight, "batch pos d_model, head d_head d_model -> batch pos head d_head")
    return out if bias is None else out + bias


def keep_unedited_bits(spelled_out: Tensor, fused: Tensor, same: Tensor) -> Tensor:
    """The spelled-out result where a hook changed something, and elsewhere the fused one, to the bit.

    A hook that changes nothing then changes no bit of the output. Gradients always flow through the spelled-out computation,
    which holds the hooked activation: `spelled_out - spelled_out.detach()` is zero in value only.
    """
    return torch.where(same, fused.detach() + (spelled_out - spelled_out.detach()), spelled_out)
