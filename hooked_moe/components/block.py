from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.grouped_query_attention import GroupedQueryAttention
from hooked_moe.components.key_value_cache import LayerCache
from hooked_moe.components.latent_attention import LatentAttention
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import HookedRMSNorm
from hooked_moe.components.rotary import Rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import LayerMask
from hooked_moe.hooks.hook_point import HookPoint


class Block(nn.Module):
    """A pre-norm transformer block: attention, then experts (or one dense MLP), each added to the residual stream."""

    hook_out_is_single_residual_stream = True
    """What TransformerLens asks of a block before it reads a logit lens from it."""

    def __init__(self, cfg: HookedMoEConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = HookedRMSNorm(cfg.d_model, cfg.eps)
        self.attn = GroupedQueryAttention(cfg, layer) if cfg.kv_lora_rank is None else LatentAttention(cfg, layer)
        self.ln2 = HookedRMSNorm(cfg.d_model, cfg.eps)
        self.mlp = (
            MoE(cfg, cfg.experts_in(layer)) if cfg.d_mlp is None or cfg.experts_in(layer) else GatedMLP(cfg.d_model, cfg.d_mlp)
        )
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        rotate: Rotation,
        visible: Bool[Tensor, "batch 1 query key"] | None = None,
        mask: LayerMask | None = None,
        past: LayerCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.ln1(resid), rotate, visible, past)))
        x = self.ln2(resid)
        mlp_out = self.mlp(x) if mask is None else self.mlp(x, mask)
        return self.hook_resid_post(resid + self.hook_mlp_out(mlp_out))
