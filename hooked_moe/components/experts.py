"""The experts: many small SwiGLU networks, each run on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_moe.config import HookedMoEConfig
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels.cpu.expert_mlp import Blocks, blocks_of, expert_mlp, product_by_block, runs_by_block, swiglu_by_block
from hooked_moe.kernels.cpu.grouped_matmul import grouped_matmul
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.routing import group_by_expert
from hooked_moe.kernels.swiglu import gather_rows, swiglu


class ExpertGroups:
    """Token copies sorted by expert. n = batch * pos * slot rows; within an expert, rows keep their (batch, pos) order."""

    def __init__(self, indices: Int[Tensor, "batch pos slot"], num_experts: int) -> None:
        self.shape, self.indices = indices.shape, indices
        self.order, place, self.ends = group_by_expert(indices.flatten(0, 1), num_experts)
        self.place = place.view(self.shape)
        """The row of each slot."""

    @cached_property
    def expert_of_row(self) -> Int[Tensor, " n"]:
        return self.indices.flatten().index_select(0, self.order)

    def blocks(self, dtype: torch.dtype) -> Blocks:
        """For experts that run one after another."""
        return blocks_of(self.ends_on_host, dtype)

    @cached_property
    def ends_on_host(self) -> list[int]:
        return self.ends.tolist()

    def gather(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "n d_model"]:
        """A copy of each token for each expert it goes to."""
        return gather_rows(x.flatten(0, 1), self.order, self.place.flatten(0, 1))

    def to_slots(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "batch pos slot width"]:
        return x.index_select(0, self.place.flatten()).unflatten(0, self.shape)

    def to_sorted(self, x: Float[Tensor, "batch pos slot width"]) -> Float[Tensor, "n width"]:
        return x.flatten(0, 2).index_select(0, self.order)

    def flat_tokens(self) -> Int[Tensor, " n"]:
        """Which token every row is a copy of, batch row after batch row."""
        return self.order // self.shape[-1]

    def tokens(self) -> Int[Tensor, "n 2"]:
        """The same, as (batch, pos)."""
        token = self.flat_tokens()
        return torch.stack((token // self.shape[1], token % self.shape[1]), dim=-1)


class ExpertSite(nn.Module):
    """Where one expert's output can be hooked; the weights of all experts are stacked in `Experts`."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_out = HookPoint()


class Experts(nn.Module):
    """`W_in[e, 0]` is the gate projection of expert e and `W_in[e, 1]` its up projection; `W_out[e]` its down projection.

    Biases, where a family has them, belong to the expert: its output goes with them where it is left out.
    """

    def __init__(self, cfg: HookedMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(num_experts, 2, cfg.d_expert, cfg.d_model))
        self.W_out = nn.Parameter(torch.empty(num_experts, cfg.d_model, cfg.d_expert))
        self.b_in = nn.Parameter(torch.zeros(num_experts, 2, cfg.d_expert)) if cfg.expert_bias else None
        self.b_out = nn.Parameter(torch.zeros(num_experts, cfg.d_model)) if cfg.expert_bias else None
        self.clamp = cfg.clamped_swiglu
        sites = [ExpertSite() for _ in range(num_experts)]
        for index, site in enumerate(sites):
            self.add_module(str(index), site)
        self.hook_points = [site.hook_out for site in sites]
        self._listened_to: set[HookPoint] = set()
        for point in self.hook_points:
            point.listened_to = self._listened_to

    def keep(self, kept: Sequence[int]) -> None:
        """Forget all experts but these; the i-th kept one is expert i from now on."""
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[kept].clone(), parameter.requires_grad))
        for index in range(len(kept), len(self.hook_points)):
            delattr(self, str(index))
        self._listened_to.difference_update(self.hook_points[len(kept) :])
        self.hook_points = self.hook_points[: len(kept)]

    @property
    def _gate_and_up(self) -> Float[Tensor, "expert gate_and_up d_model"]:
        return self.W_in.flatten(1, 2)

    @property
    def _gate_and_up_bias(self) -> Float[Tensor, "expert gate_and_up"] | None:
        return None if self.b_in is None else self.b_in.flatten(1)

    @property
    def hooked(self) -> bool:
        """Whether any hook is attached to a single expert."""
        return bool(self._listened_to)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], groups: ExpertGroups, scratch: Scratch | None = None
    ) -> Float[Tensor, "n d_model"]:
        """The stages below in one go, without hooks between them; on a CPU in `scratch`, where it is given."""
        if self._by_block(groups, x):
            blocks = groups.blocks(x.dtype)
            flat, tokens, b_in = x.flatten(0, 1), groups.flat_tokens(), self._gate_and_up_bias
            return expert_mlp(flat, tokens, self._gate_and_up, self.W_out, blocks, scratch, b_in, self.b_out, self.clamp)
        post = swiglu(self._grouped(groups.gather(x), self._gate_and_up, self._gate_and_up_bias, groups), self.clamp)
        return self._grouped(post, self.W_out, self.b_out, groups)

    def project_in(self, x: Float[Tensor, "batch pos d_model"], groups: ExpertGroups) -> Float[Tensor, "n gate_and_up"]:
        """Gate projections, then up projections, of a copy of each token for each of its experts."""
        return self._product(groups.gather(x), self._gate_and_up, self._gate_and_up_bias, groups)

    def activate(self, pre: Float[Tensor, "n gate_and_up"], groups: ExpertGroups) -> Float[Tensor, "n d_expert"]:
        if self._by_block(groups, pre):
            return swiglu_by_block(pre, groups.blocks(pre.dtype), self.clamp)
        return swiglu(pre, self.clamp)

    def project_out(self, post: Float[Tensor, "n d_expert"], groups: ExpertGroups) -> Float[Tensor, "n d_model"]:
        """Down projection, then the hooks of the single experts."""
        out = self._product(post, self.W_out, self.b_out, groups)
        return self._hook_each_expert(out, groups) if self.hooked else out

    def _by_block(self, groups: ExpertGroups, x: Tensor) -> bool:
        # named here: parameters() would walk through the hook points of all experts
        weights = [w for w in (self.W_in, self.b_in, self.b_out) if w is not None]
        return runs_by_block(len(groups.order), self.W_out, x, *weights)

    def _product(
        self,
        x: Float[Tensor, "n d_in"],
        weight: Float[Tensor, "expert d_out d_in"],
        bias: Float[Tensor, "expert d_out"] | None,
        groups: ExpertGroups,
    ) -> Float[Tensor, "n d_out"]:
        if not self._by_block(groups, x):
            return self._grouped(x, weight, bias, groups)
        return _with_bias(product_by_block(x, weight, groups.blocks(x.dtype)), bias, groups)

    @staticmethod
    def _grouped(
        x: Float[Tensor, "n d_in"],
        weight: Float[Tensor, "expert d_out d_in"],
        bias: Float[Tensor, "expert d_out"] | None,
        groups: ExpertGroups,
    ) -> Float[Tensor, "n d_out"]:
        return _with_bias(grouped_matmul(x, weight, groups.ends), bias, groups)

    def _hook_each_expert(self, out: Float[Tensor, "n d_model"], groups: ExpertGroups) -> Float[Tensor, "n d_model"]:
        counts = [end - start for start, end in pairwise([0, *groups.ends_on_host])]
        pieces = []
        for point, tokens, rows in zip(self.hook_points, groups.tokens().split(counts), out.split(counts), strict=True):
            point.ctx["tokens"] = tokens
            pieces.append(point(rows))
        return torch.cat(pieces) if any(point.may_edit for point in self.hook_points) else out


def _with_bias(
    out: Float[Tensor, "n d_out"], bias: Float[Tensor, "expert d_out"] | None, groups: ExpertGroups
) -> Float[Tensor, "n d_out"]:
    """Each row with the bias of its expert, if experts have one."""
    return out if bias is None else out + bias.index_select(0, groups.expert_of_row)
