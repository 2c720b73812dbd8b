"""Multi-head latent attention: keys and values of all heads from one small vector per token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.components.attention import Attention, QueriesKeysValues, project_heads
from hooked_moe.components.norm import RMSNorm
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels.cpu.few_rows import linear

LATENT_EPS = 1e-6
"""The eps of the norms of latents, whatever that of the other norms (transformers' DeepseekV2RMSNorm default)."""


class LatentAttention(Attention):
    """DeepSeek-V2 (arXiv 2405.04434, section 2.1). A head's query and key are [content | position]: only the last `d_rotary`
    coordinates are rotated, and those of the key are the same for all heads.

    Weights in the paper's names: `W_DKV` stacks W^DKV and, in its last `d_rotary` rows, W^KR; `W_UKV` stacks W^UK and W^UV per
    head; `W_Q` stacks W^UQ and W^QR, and takes the normalised latent query `x W_DQ` where there is one.
    """

    def __init__(self, cfg: HookedMoEConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        assert cfg.kv_lora_rank is not None
        h, d, self.d_content = cfg.n_heads, cfg.d_model, cfg.d_head - cfg.rotary_width
        self.W_DQ = nn.Parameter(torch.empty(cfg.q_lora_rank, d)) if cfg.q_lora_rank else None
        self.q_norm = RMSNorm(cfg.q_lora_rank, LATENT_EPS) if cfg.q_lora_rank else None
        self.W_Q = nn.Parameter(torch.empty(h, cfg.d_head, cfg.q_lora_rank or d))
        self.W_DKV = nn.Parameter(torch.empty(cfg.kv_lora_rank + cfg.rotary_width, d))
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, LATENT_EPS)
        self.W_UKV = nn.Parameter(torch.empty(h, self.d_content + cfg.value_width, cfg.kv_lora_rank))
        self.hook_kv_latent = HookPoint()

    def project(self, x: Float[Tensor, "batch pos d_model"], rotate: Rotation) -> QueriesKeysValues:
        """Down to the latents, up to the heads, rotated."""
        down = linear(x, self.W_DKV)
        latent, k_position = down.split([len(self.kv_norm.w), self.cfg.rotary_width], dim=-1)
        up = project_heads(self.hook_kv_latent(self.kv_norm(latent)), self.W_UKV)
        if self.W_DQ is not None and self.q_norm is not None:
            x = self.q_norm(linear(x, self.W_DQ))
        q = self.hook_q(project_heads(x, self.W_Q))
        k_content, v = up.split([self.d_content, self.cfg.value_width], dim=-1)
        k = self.hook_k(torch.cat((k_content, k_position.unsqueeze(2).expand(-1, -1, self.cfg.n_heads, -1)), dim=-1))
        v = self.hook_v(v)
        return QueriesKeysValues(self.hook_rot_q(self._rotated(q, rotate)), self.hook_rot_k(self._rotated(k, rotate)), v)

    def _rotated(self, x: Float[Tensor, "batch pos head d_head"], rotate: Rotation) -> Float[Tensor, "batch pos head d_head"]:
        content, position = x.split([self.d_content, self.cfg.rotary_width], dim=-1)
        return torch.cat((content, rotate(position)), dim=-1)
