"""The router: one logit per expert, and the rule that makes routing of them (`hooked_moe.kernels.routing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
        self.b_logits = nn.Parameter(torch.zeros(num_experts)) if cfg.router_bias else None
        # Not for gradients: training moves it by how many tokens each expert gets (arXiv 2412.19437, section 2.1.2).
        self.b_selection = nn.Parameter(torch.zeros(num_experts), requires_grad=False) if cfg.selection_bias else None
        self.rule = RoutingRule(
            slots=cfg.experts_per_token,
            renormalize=cfg.norm_topk_prob,
            scale=cfg.routed_scaling_factor,
            groups=cfg.n_expert_groups,
            groups_kept=cfg.groups_per_token,
            score=cfg.router_score,
            group_score=cfg.group_score,
        )

    @without_autocast()
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        """Router logits."""
        bias = None if self.b_logits is None else at_least_float32(self.b_logits)
        return F.linear(at_least_float32(x), at_least_float32(self.W), bias)

    def keep(self, kept: Sequence[int]) -> None:
        """Forget all experts but these; the i-th kept one is expert i from now on."""
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[kept].clone(), parameter.requires_grad))

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Moves and converts, but the selection bias to no half precision: its differences are finer than it could tell."""
        before = None if self.b_selection is None else self.b_selection.detach()
        super()._apply(fn, recurse)
        if before is not None and self.b_selection is not None and self.b_selection.dtype.itemsize < 4:
            self.b_selection.data = before.to(self.b_selection.device)
        return self
