"""Attention whose keys and values are projected from the residual stream, in as many heads as queries or in fewer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.components.attention import Attention, QueriesKeysValues, project_heads
from hooked_moe.components.norm import RMSNorm
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.hooks.hook_point import HookPoint


class GroupedQueryAttention(Attention):
    """Ainslie et al. 2023 (arXiv 2305.13245); ordinary multi-head attention where there are as many key/value heads as heads."""

    def __init__(self, cfg: HookedMoEConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        h, kv, e, d = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_model
        self.W_Q = nn.Parameter(torch.empty(h, e, d))
        self.W_K = nn.Parameter(torch.empty(kv, e, d))
        self.W_V = nn.Parameter(torch.empty(kv, e, d))
        self.b_Q = nn.Parameter(torch.zeros(h, e)) if cfg.qkv_bias else None
        self.b_K = nn.Parameter(torch.zeros(kv, e)) if cfg.qkv_bias else None
        self.b_V = nn.Parameter(torch.zeros(kv, e)) if cfg.qkv_bias else None
        widths = {"full": (h * e, kv * e), "head": (e, e)}.get(cfg.qk_norm or "")
        self.q_norm = RMSNorm(widths[0], cfg.eps) if widths else None
        self.k_norm = RMSNorm(widths[1], cfg.eps) if widths else None

    def project(self, x: Float[Tensor, "batch pos d_model"], rotate: Rotation) -> QueriesKeysValues:
        """Projected, normalised, clipped, rotated."""
        q = _normalised(project_and_hook(self.hook_q, x, self.W_Q, self.b_Q), self.q_norm)
        k = _normalised(project_and_hook(self.hook_k, x, self.W_K, self.b_K), self.k_norm)
        v = project_and_hook(self.hook_v, x, self.W_V, self.b_V)
        if self.cfg.clip_qkv is not None:
            q, k, v = (x.clamp(-self.cfg.clip_qkv, self.cfg.clip_qkv) for x in (q, k, v))
        return QueriesKeysValues(self.hook_rot_q(self._rotated(q, rotate)), self.hook_rot_k(self._rotated(k, rotate)), v)

    def _rotated(self, x: Float[Tensor, "batch pos head d_head"], rotate: Rotation) -> Float[Tensor, "batch pos head d_head"]:
        width = self.cfg.rotary_width
        return rotate(x) if width == x.shape[-1] else torch.cat((rotate(x[..., :width]), x[..., width:]), dim=-1)


def project_and_hook(hook: HookPoint, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hook(project_heads(x, weight, bias))


def _normalised(x: Float[Tensor, "batch pos head d_head"], norm: RMSNorm | None) -> Float[Tensor, "batch pos head d_head"]:
    """Over each head, or over all heads together, as wide as the norm is."""
    if norm is None:
        return x
    return norm(x) if len(norm.w) == x.shape[-1] else norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])
