"""RouteFix: what a slope cannot see of later routers, computed exactly.

A gradient holds the selection of later experts fixed and takes their weights for linear. Here every later router reads each
patch's direct path exactly: its new experts, which read what they read before, and their new weights stand in for the router's
linear term. It extends to routers what AtP* does for attention patterns (Kramár et al. 2024, arXiv 2403.00745), at the cost of a
forward in which every expert reads every token, and of a product with each later router for every patch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.gradients import Gradients
from hooked_moe.circuits.pairs import ExpertDeltas, PromptPair
from hooked_moe.components.precision import at_least_float32
from hooked_moe.kernels import routing


def rerouting_terms(
    pair: PromptPair, by_layer: dict[int, ExpertDeltas], gradients: Gradients
) -> dict[int, Float[Tensor, "batch pos slot"]]:
    """By layer: what is to be added to the first order of every patch, for all later routers."""
    terms = {
        layer: torch.zeros(deltas.experts.shape, dtype=torch.float32, device=deltas.delta.device)
        for layer, deltas in by_layer.items()
    }
    for later in pair.model.cfg.moe_layers:
        earlier = {layer: deltas for layer, deltas in by_layer.items() if layer < later}
        if earlier:
            router = _LaterRouter(pair, later, gradients[later])
            for layer, deltas in earlier.items():
                terms[layer] = terms[layer] + router.beyond_first_order(deltas.delta)
    return terms


class _LaterRouter:
    """A router of the corrupted run, and what sending a token to each expert is worth, to first order."""

    def __init__(self, pair: PromptPair, layer: int, gradient: Float[Tensor, "batch pos d_model"]) -> None:
        self.moe, self.ln = pair.moe(layer), pair.model.blocks[layer].ln2
        self.mid = pair.resid_mid("corrupt", layer).detach()
        x = pair.mlp_input("corrupt", layer).detach()
        every = torch.arange(self.moe.num_experts, device=x.device).expand(*x.shape[:2], -1)
        with torch.no_grad():
            outputs = self.moe.run_experts(x, every).in_slots()
        self.worth = (at_least_float32(outputs) * at_least_float32(gradient).unsqueeze(2)).sum(-1)
        mid = self.mid.clone().requires_grad_()
        with torch.enable_grad():
            self.value = self._value(mid.unsqueeze(2))
            (self.slope,) = torch.autograd.grad(self.value.sum(), mid)

    def beyond_first_order(self, delta: Float[Tensor, "batch pos slot d_model"]) -> Float[Tensor, "batch pos slot"]:
        with torch.no_grad():
            exact = self._value(self.mid.unsqueeze(2) + delta) - self.value.detach()
            return exact - (at_least_float32(delta) * at_least_float32(self.slope).unsqueeze(2)).sum(-1)

    def _value(self, mid: Float[Tensor, "batch pos slot d_model"]) -> Float[Tensor, "batch pos slot"]:
        """What the token is worth with the routing that this stream has."""
        logits = self.moe.router(self.ln(mid.flatten(1, 2))).unflatten(1, mid.shape[1:3])
        rule, bias = self.moe.router.rule, self.moe.router.b_selection
        scores = routing.score(logits, rule)
        indices = routing.select(scores.detach(), rule, bias=bias)
        worth = self.worth.unsqueeze(2).expand(*logits.shape).gather(-1, indices)
        return (routing.weigh(scores, indices, rule) * worth).sum(-1)
