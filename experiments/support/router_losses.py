"""The losses of a training that keep its router from sending every token to a few experts."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_moe import HookedMoEConfig, HookPoint
from hooked_moe.hooks.hooked_module import Hook


class RouterLosses:
    """Load balancing (Fedus et al. 2021, eq. 4) and router z-loss (Zoph et al. 2022, eq. 5), read off hook points."""

    def __init__(self, cfg: HookedMoEConfig) -> None:
        self.cfg = cfg
        self.balance: list[Tensor] = []
        self.z: list[Tensor] = []
        self.counts = torch.zeros(len(cfg.moe_layers), cfg.num_experts)

    def hooks(self) -> list[Hook]:
        return [
            (lambda name: name.endswith("hook_router_logits"), self._on_logits),
            (lambda name: name.endswith("hook_expert_indices"), self._on_indices),
        ]

    def _on_logits(self, logits: Tensor, hook: HookPoint) -> None:
        self.z.append(logits.logsumexp(-1).square().mean())
        self._mean_probability = logits.softmax(-1).mean((0, 1))

    def _on_indices(self, indices: Tensor, hook: HookPoint) -> None:
        counts = torch.bincount(indices.flatten(), minlength=self.cfg.num_experts)
        self.counts[self.cfg.moe_layers.index(hook.layer())] = counts.cpu().float()
        share = counts / indices.numel()
        self.balance.append(self.cfg.num_experts * (share * self._mean_probability).sum())

    def total(self, load_balancing: float, router_z: float) -> Tensor:
        """The sum over layers of one forward pass with these weights; forgets it."""
        loss = load_balancing * torch.stack(self.balance).sum() + router_z * torch.stack(self.z).sum()
        self.balance.clear()
        self.z.clear()
        return loss
