"""The mixture of experts: `y = sum over the top-k experts i of g_i(x) E_i(x)` (arXiv 2606.10703, section 2), and shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_moe.components.experts import ExpertGroups, Experts
from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.router import Router
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import LayerMask
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels import routing
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.weighted_sum import masked_combine, weighted_sum


class Routing(NamedTuple):
    indices: Int[Tensor, "batch pos slot"]
    weights: Float[Tensor, "batch pos slot"]


class ExpertOutputs(NamedTuple):
    """Outputs of the active experts, in whatever order their rows are: slot j of a token is `rows[place[batch, pos, j]]`."""

    rows: Float[Tensor, "n d_model"]
    place: Int[Tensor, "batch pos slot"]

    @classmethod
    def of_slots(cls, outputs: Float[Tensor, "batch pos slot d_model"]) -> ExpertOutputs:
        rows = outputs.flatten(0, 2)
        return cls(rows, torch.arange(len(rows), device=rows.device).view(outputs.shape[:3]))

    def in_slots(self) -> Float[Tensor, "batch pos slot d_model"]:
        return self.rows.index_select(0, self.place.flatten()).unflatten(0, self.place.shape)


class MoE(nn.Module):
    """Router, experts and combination. Routing tensors keep [batch, pos, slot]; only the products run sorted by expert."""

    def __init__(self, cfg: HookedMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = Router(cfg, num_experts)
        self.experts = Experts(cfg, num_experts)
        self.shared = GatedMLP(cfg.d_model, cfg.d_shared) if cfg.d_shared is not None else None
        self.W_shared_gate = nn.Parameter(torch.empty(1, cfg.d_model)) if cfg.shared_gate else None
        self.hook_router_logits, self.hook_expert_indices, self.hook_expert_weights = HookPoint(), HookPoint(), HookPoint()
        self._routing_hooks = [self.hook_expert_indices]
        if cfg.router_score == "sigmoid":
            self.hook_router_scores = HookPoint()
            self._routing_hooks.append(self.hook_router_scores)
        if cfg.selection_bias:
            self.hook_selection_bias = HookPoint()
            self._routing_hooks.append(self.hook_selection_bias)
        self.hook_expert_pre, self.hook_expert_pre_linear, self.hook_expert_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_expert_out, self.hook_routed_out = HookPoint(), HookPoint()
        if self.shared is not None:
            self.hook_shared_out = HookPoint()
        if self.W_shared_gate is not None:
            self.hook_shared_gate = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"], mask: LayerMask | None = None) -> Float[Tensor, "batch pos d_model"]:
        indices, weights = self.route(x, mask)
        routed = self.combine(self.run_experts(x, indices), weights)
        return add_shared(routed, self.run_shared(x))

    def route(self, x: Float[Tensor, "batch pos d_model"], mask: LayerMask | None = None) -> Routing:
        """Which experts every token goes to, and the weights as applied."""
        logits, rule = self.hook_router_logits(self.router(x)), self.router.rule
        keep = None if mask is None else mask.selectable
        if use_kernels(logits) and not any(point.active for point in self._routing_hooks):
            flat_keep = None if keep is None else keep.flatten(0, 1)
            weights, indices = routing.route(logits.flatten(0, 1), rule, flat_keep, self.router.b_selection)
            weights, indices = weights.unflatten(0, x.shape[:2]), indices.unflatten(0, x.shape[:2])
        else:
            scores = routing.score(logits, rule, keep)
            if rule.score == "sigmoid":
                scores = self.hook_router_scores(scores)
            bias: Tensor | None = self.router.b_selection
            if bias is not None and self.hook_selection_bias.active:
                bias = self.hook_selection_bias(bias.expand_as(scores).clone())
            indices = self.hook_expert_indices(routing.select(scores, rule, keep, bias))
            if self.hook_expert_indices.active:
                self._check_indices(indices)
            weights = routing.weigh(scores, indices, rule)
        if mask is not None:
            weights = mask.after_selection(weights, indices)
        return Routing(indices, self.hook_expert_weights(weights.to(x.dtype)))

    def run_experts(
        self,
        x: Float[Tensor, "batch pos d_model"],
        indices: Int[Tensor, "batch pos slot"],
        scratch: Scratch | None = None,
    ) -> ExpertOutputs:
        """Each active expert's output, before weighting. It may lie in `scratch`, until that is used again."""
        if torch.compiler.is_compiling():
            from hooked_moe.components import outside_of_graphs

            return outside_of_graphs.run_experts(self, x, indices)
        return self.run_experts_eagerly(x, indices, scratch)

    def run_experts_eagerly(
        self, x: Float[Tensor, "batch pos d_model"], indices: Int[Tensor, "batch pos slot"], scratch: Scratch | None = None
    ) -> ExpertOutputs:
        groups = ExpertGroups(indices, self.num_experts)
        outputs = ExpertOutputs(self._expert_rows(x, groups, scratch), groups.place)
        if not self.hook_expert_out.active:
            return outputs
        seen = self.hook_expert_out(outputs.in_slots())
        return ExpertOutputs.of_slots(seen) if self.hook_expert_out.may_edit else outputs

    def combine(self, outputs: ExpertOutputs, weights: Float[Tensor, "batch pos slot"]) -> Float[Tensor, "batch pos d_model"]:
        """The weighted sum over the active experts."""
        return self.hook_routed_out(weighted_sum(outputs.rows, outputs.place, weights))

    def run_shared(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"] | None:
        """The shared experts' output, gated where the family gates it; None where there are none."""
        if self.shared is None:
            return None
        out = self.shared(x)
        if self.W_shared_gate is not None:
            gate = einsum(x, self.W_shared_gate, "batch pos d_model, one d_model -> batch pos one").sigmoid()
            out = out * self.hook_shared_gate(gate)
        return self.hook_shared_out(out)

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Forget all routed experts but these, for good; the i-th kept one is expert i from now on."""
        self.router.keep(kept)
        self.experts.keep(kept)
        self.num_experts = len(kept)

    def _expert_rows(
        self, x: Float[Tensor, "batch pos d_model"], groups: ExpertGroups, scratch: Scratch | None
    ) -> Float[Tensor, "n d_model"]:
        hooks = self.hook_expert_pre, self.hook_expert_pre_linear, self.hook_expert_post
        if not (self.experts.hooked or any(hook.active for hook in hooks)):
            return self.experts(x, groups, scratch)
        pre = self._hook_pre(self.experts.project_in(x, groups), groups)
        post = _in_slots(self.hook_expert_post, self.experts.activate(pre, groups), groups)
        return self.experts.project_out(post, groups)

    def _hook_pre(self, both: Float[Tensor, "n gate_and_up"], groups: ExpertGroups) -> Float[Tensor, "n gate_and_up"]:
        if not (self.hook_expert_pre.active or self.hook_expert_pre_linear.active):
            return both
        pre, pre_linear = both.chunk(2, dim=-1)
        pre, pre_linear = _in_slots(self.hook_expert_pre, pre, groups), _in_slots(self.hook_expert_pre_linear, pre_linear, groups)
        if not (self.hook_expert_pre.may_edit or self.hook_expert_pre_linear.may_edit):
            return both
        return torch.cat((pre, pre_linear), dim=-1)  # the same memory layout as without hooks, hence the same rounding

    def _check_indices(self, indices: Tensor) -> None:
        if indices.numel() and (indices.min() < 0 or indices.max() >= self.num_experts):
            raise ValueError(
                f"the hook on {self.hook_expert_indices.name} returned experts from {int(indices.min())} to "
                f"{int(indices.max())}; this layer has experts 0 to {self.num_experts - 1}"
            )


def add_shared(routed: Float[Tensor, "*any d_model"], shared: Tensor | None) -> Float[Tensor, "*any d_model"]:
    """The layer's output: what the routed experts and the shared ones, if there are any, make together."""
    return routed if shared is None else routed + shared


def combine_onto(
    resid: Float[Tensor, "batch pos d_model"],
    outputs: ExpertOutputs,
    weights: Float[Tensor, "variant batch pos slot"],
    shared: Float[Tensor, "batch pos d_model"] | None,
) -> Float[Tensor, "variant batch pos d_model"]:
    """The residual stream after the layer, under each variant's routing weights; rounded once where operators run."""
    if use_kernels(resid):
        return masked_combine(outputs.rows, outputs.place, weights, add_shared(resid, shared))
    return resid + add_shared(masked_combine(outputs.rows, outputs.place, weights), shared)


def _in_slots(hook: HookPoint, x: Float[Tensor, "n width"], groups: ExpertGroups) -> Float[Tensor, "n width"]:
    """Pass `x` through a hook point in the layout [batch pos slot width], if anyone listens."""
    if not hook.active:
        return x
    seen = hook(groups.to_slots(x))
    return groups.to_sorted(seen) if hook.may_edit else x
