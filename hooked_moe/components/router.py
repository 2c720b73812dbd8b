"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.config import HookedMoEConfig
from hooked_moe.kernels.routing import Rule, route


class Router(nn.Module):
    """Scores every expert in float32, whatever the dtype of the model: half precision ties the k-th expert too often."""

    def __init__(self, cfg: HookedMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.W = nn.Parameter(torch.empty(num_experts, cfg.d_model))

    @without_autocast()
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        """Router logits."""
        weight = at_least_float32(self.W)
        return einsum(at_least_float32(x), weight, "batch pos d_model, expert d_model -> batch pos expert")

    def route(
        self, logits: Float[Tensor, "batch pos expert"], keep: Bool[Tensor, "batch pos expert"] | None
    ) -> tuple[Int[Tensor, "batch pos slot"], Float[Tensor, "batch pos slot"]]:
        """`select` and `weigh` at once. Where `keep` is False, an expert has no probability."""
        cfg = self.cfg
        groups = cfg.n_expert_groups, cfg.groups_per_token
        rule = Rule(cfg.experts_per_token, cfg.norm_topk_prob, cfg.routed_scaling_factor, *groups)
        weights, indices = route(logits.flatten(0, 1), rule, None if keep is None else keep.flatten(0, 1))
        return indices.unflatten(0, logits.shape[:2]), weights.unflatten(0, logits.shape[:2])

    def select(self, probabilities: Float[Tensor, "batch pos expert"]) -> Int[Tensor, "batch pos slot"]:
        """The k most probable experts, most probable first; of the token's groups only, where experts stand in groups."""
        if self.cfg.n_expert_groups > 1:
            probabilities = self._within_best_groups(probabilities)
        return probabilities.topk(self.cfg.experts_per_token, dim=-1).indices

    def _within_best_groups(self, probabilities: Float[Tensor, "batch pos expert"]) -> Float[Tensor, "batch pos expert"]:
        """Impossible outside the groups with the most probable best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2): below
        zero, so that an expert which a mask removed from these groups does not give its slot to one of another group."""
        groups = probabilities.unflatten(-1, (self.cfg.n_expert_groups, -1))
        best = groups.amax(dim=-1).topk(self.cfg.groups_per_token, dim=-1).indices
        chosen = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=groups.device).scatter(-1, best, True)
        return groups.masked_fill(~chosen.unsqueeze(-1), -1.0).flatten(-2)

    def weigh(
        self, probabilities: Float[Tensor, "batch pos expert"], indices: Int[Tensor, "batch pos slot"]
    ) -> Float[Tensor, "batch pos slot"]:
        """Routing weights of the given experts: their probabilities, rescaled to sum to one and scaled as the family does."""
        weights = probabilities.gather(-1, indices)
        if self.cfg.norm_topk_prob:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)  # zero if a mask leaves no expert
        return weights if self.cfg.routed_scaling_factor == 1 else weights * self.cfg.routed_scaling_factor
