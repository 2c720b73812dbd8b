"""The experts: many small SwiGLU networks, each run on the tokens routed to it, all in two grouped products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_moe.config import HookedMoEConfig
from hooked_moe.hook_points import HookPoint
from hooked_moe.kernels.grouped_matmul import grouped_matmul
from hooked_moe.kernels.routing import group_by_expert
from hooked_moe.kernels.swiglu import gather_rows


class ExpertGroups:
    """Token copies sorted by expert. n = batch * pos * slot rows; within an expert, rows keep their (batch, pos) order."""

    def __init__(self, indices: Int[Tensor, "batch pos slot"], num_experts: int) -> None:
        self.shape = indices.shape
        self.order, place, self.ends = group_by_expert(indices.flatten(0, 1), num_experts)
        self.place = place.view(self.shape)
        """The row of each slot."""

    def gather(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "n d_model"]:
        """A copy of each token for each expert it goes to."""
        return gather_rows(x.flatten(0, 1), self.order, self.place.flatten(0, 1))

    def to_slots(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "batch pos slot width"]:
        return x.index_select(0, self.place.flatten()).unflatten(0, self.shape)

    def to_sorted(self, x: Float[Tensor, "batch pos slot width"]) -> Float[Tensor, "n width"]:
        return x.flatten(0, 2).index_select(0, self.order)

    def tokens(self) -> Int[Tensor, "n 2"]:
        """(batch, pos) of every row."""
        token = self.order // self.shape[-1]
        return torch.stack((token // self.shape[1], token % self.shape[1]), dim=-1)


class ExpertSite(nn.Module):
    """Where one expert's output can be hooked; the weights of all experts are stacked in `Experts`."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_out = HookPoint()


class Experts(nn.Module):
    """`W_in[e, 0]` is the gate projection of expert e and `W_in[e, 1]` its up projection; `W_out[e]` its down projection."""

    def __init__(self, cfg: HookedMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(num_experts, 2, cfg.d_expert, cfg.d_model))
        self.W_out = nn.Parameter(torch.empty(num_experts, cfg.d_model, cfg.d_expert))
        self.sites = [ExpertSite() for _ in range(num_experts)]
        for index, site in enumerate(self.sites):
            self.add_module(str(index), site)

    def keep(self, kept: Sequence[int]) -> None:
        """Forget all experts but these; the i-th kept one is expert i from now on."""
        with torch.no_grad():
            self.W_in = nn.Parameter(self.W_in[kept].clone(), self.W_in.requires_grad)
            self.W_out = nn.Parameter(self.W_out[kept].clone(), self.W_out.requires_grad)
        for index in range(len(kept), len(self.sites)):
            delattr(self, str(index))
        self.sites = self.sites[: len(kept)]

    def project_in(self, x: Float[Tensor, "n d_model"], groups: ExpertGroups) -> Float[Tensor, "n gate_and_up"]:
        """Gate projections, then up projections, by one grouped product."""
        weight = rearrange(self.W_in, "expert two d_expert d_model -> expert (two d_expert) d_model")
        return grouped_matmul(x, weight, groups.ends)

    def project_out(self, post: Float[Tensor, "n d_expert"], groups: ExpertGroups) -> Float[Tensor, "n d_model"]:
        """Down projection, then the hooks of the single experts."""
        out = grouped_matmul(post, self.W_out, groups.ends)
        if any(site.hook_out.active for site in self.sites):
            out = self._hook_each_expert(out, groups)
        return out

    def _hook_each_expert(self, out: Float[Tensor, "n d_model"], groups: ExpertGroups) -> Float[Tensor, "n d_model"]:
        ends = groups.ends.tolist()
        tokens = groups.tokens()
        pieces = []
        for site, start, end in zip(self.sites, [0, *ends[:-1]], ends, strict=True):
            site.hook_out.ctx["tokens"] = tokens[start:end]
            pieces.append(site.hook_out(out[start:end]))
        return torch.cat(pieces) if any(site.hook_out.may_edit for site in self.sites) else out
