"""The router: one logit per expert, and the rule that makes routing of them (`hooked_moe.kernels.routing`)."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.config import HookedMoEConfig
from hooked_moe.kernels.routing import RoutingRule


class Router(nn.Module):
    """Logits of every expert, in float32 whatever the dtype of the model: half precision ties the k-th expert too often."""

    def __init__(self, cfg: HookedMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_experts, cfg.d_model))
        self.rule = RoutingRule(
            slots=cfg.experts_per_token,
            renormalize=cfg.norm_topk_prob,
            scale=cfg.routed_scaling_factor,
            groups=cfg.n_expert_groups,
            groups_kept=cfg.groups_per_token,
            score=cfg.router_score,
            selection_bias=cfg.selection_bias,
            group_score=cfg.group_score,
        )

    @without_autocast()
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        """Router logits."""
        weight = at_least_float32(self.W)
        return einsum(at_least_float32(x), weight, "batch pos d_model, expert d_model -> batch pos expert")
