from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_moe.components.attention import Attention
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import RMSNorm
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import LayerMask
from hooked_moe.hook_points import HookPoint


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a mixture of experts, each added to the residual stream."""

    def __init__(self, cfg: HookedMoEConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(cfg.d_model, cfg.eps)
        self.attn = Attention(cfg)
        self.ln2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = MoE(cfg)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        rotate: Rotation,
        visible: Bool[Tensor, "batch 1 query key"] | None = None,
        mask: LayerMask | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.ln1(resid), rotate, visible)))
        return self.hook_resid_post(resid + self.hook_mlp_out(self.mlp(self.ln2(resid), mask)))
