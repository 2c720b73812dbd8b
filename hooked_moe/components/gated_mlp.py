"""The SwiGLU MLP (Shazeer 2020): of dense layers, and of shared experts, which serve every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels.cpu.few_rows import linear


class GatedMLP(nn.Module):
    """`W_out (silu(W_gate x) * W_in x)`, in TransformerLens's names."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.W_gate = nn.Parameter(torch.empty(d_mlp, d_model))
        self.W_in = nn.Parameter(torch.empty(d_mlp, d_model))
        self.W_out = nn.Parameter(torch.empty(d_model, d_mlp))
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        pre = self.hook_pre(linear(x, self.W_gate))
        pre_linear = self.hook_pre_linear(linear(x, self.W_in))
        return linear(self.hook_post(F.silu(pre) * pre_linear), self.W_out)
