"""The QK fix: what a slope cannot see of later attention patterns, computed exactly.

A saturated softmax has no slope, and a gradient that goes through it misses what a patch does to it. Here the queries and keys of
every later layer read each patch's direct path exactly, and the new pattern, times the slope along it, stands in for the linear
term: Kramár et al. (2024, arXiv 2403.00745) do so where queries and keys themselves are patched. Values stay as they
were: in them the output is linear.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.pairs import ExpertDeltas, PromptPair
from hooked_moe.components.precision import at_least_float32
from hooked_moe.components.rotary import Rotation, rotation

LARGEST_CHANGE = 80.0
"""Of a score, in nats: beyond it a key has all of the pattern, and float32 no room."""


def pattern_terms(
    pair: PromptPair, by_layer: dict[int, ExpertDeltas], gradients: dict[int, Float[Tensor, "metric batch pos d_model"]]
) -> dict[int, Float[Tensor, "metric batch pos slot"]]:
    """By layer: what is to be added to the first order of every patch, for the attention of all later layers.

    `gradients` are those at what each layer's attention writes, of any number of metrics.
    """
    n_metrics = len(next(iter(gradients.values())))
    terms = {
        layer: torch.zeros((n_metrics, *deltas.experts.shape), dtype=torch.float32, device=deltas.delta.device)
        for layer, deltas in by_layer.items()
    }
    model, (batch, pos) = pair.model, pair.tokens.shape
    positions, everywhere, near = model.positions_and_keys(batch, pos, 0, pair.attention_mask)
    rotate = rotation(positions, model.cfg)
    for later in range(model.cfg.n_layers):
        earlier = {layer: deltas for layer, deltas in by_layer.items() if layer < later}
        if earlier:
            visible = everywhere if model.cfg.window_of(later) is None else near
            attention = _LaterAttention(pair, later, rotate, visible, gradients[later])
            for layer, deltas in earlier.items():
                terms[layer] = terms[layer] + attention.beyond_first_order(deltas.delta)
    return terms


class _LaterAttention:
    """The attention of a layer in the corrupted run, and what looking at each key is worth to each query, to first order."""

    def __init__(
        self,
        pair: PromptPair,
        layer: int,
        rotate: Rotation,
        visible: Any,
        gradients: Float[Tensor, "metric batch pos d_model"],
    ) -> None:
        block = pair.model.blocks[layer]
        self.attn, self.ln, self.rotate = block.attn, block.ln1, rotate
        self.resid = pair.resid_pre("corrupt", layer).detach()
        with torch.no_grad():
            q, k, v = self._project(self.resid)
            self.q, self.k = q, k
            n_keys = k.shape[2]
            ordered = torch.ones(n_keys, n_keys, dtype=torch.bool, device=k.device).tril()
            window = self.attn.window
            if visible is None:
                visible = ordered if window is None else ordered.triu(1 - window)
            self.visible = visible
            self.own = torch.eye(n_keys, dtype=torch.bool, device=k.device)
            self.scores = self._masked(self._products(q, k))
            self.pattern = self._softmax(self.scores)
            written = einsum(at_least_float32(gradients), at_least_float32(self.attn.W_O), "m b q d, d h e -> m b h q e")
            self.worth = einsum(written, v, "m b h q e, b h k e -> m b h q k")
            mean = (self.pattern * self.worth).sum(-1, keepdim=True)
            self.beyond_mean = self.worth - mean
        resid = self.resid.clone().requires_grad_()
        with torch.enable_grad():
            value = self._value(resid)
            slopes = [torch.autograd.grad(one.sum(), resid, retain_graph=True)[0] for one in value]
        self.value, self.slope = value.detach(), at_least_float32(torch.stack(slopes))

    def beyond_first_order(self, delta: Float[Tensor, "batch pos slot d_model"]) -> Float[Tensor, "metric batch pos slot"]:
        with torch.no_grad():
            exact = [self._value(self.resid + one) - self.value for one in delta.unbind(2)]
            linear = einsum(at_least_float32(delta), self.slope, "b p s d, m b p d -> m b p s")
            return torch.stack(exact, -1) - linear

    def _value(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "metric batch pos"]:
        """What the patterns are worth when one token's queries and keys are made of its stream in `resid`: for each token."""
        q, k, _ = self._project(resid)
        return self._as_query(q, k) + self._as_key(k)

    def _as_query(self, q: Tensor, k: Tensor) -> Float[Tensor, "metric batch pos"]:
        """The token's own pattern: a new query, and a new key at its own place."""
        itself = self.attn.cfg.attention_scale * (q * k).sum(-1)
        scores = torch.where(self.own, itself.unsqueeze(-1), self._products(q, self.k))
        return (self._softmax(self._masked(scores)) * self.worth).sum((-1, 2))

    def _as_key(self, k: Tensor) -> Float[Tensor, "metric batch pos"]:
        """How much more the patterns of other queries are worth than they were, when this key alone is new.

        With a score that rises by c, a key's share p becomes p e^c / (1 + p (e^c - 1)).
        """
        change = (self._products(self.q, k) - self.scores).masked_fill(~self.visible | self.own, 0.0)
        grown = self.pattern * change.clamp(max=LARGEST_CHANGE).expm1()
        return (grown / (1 + grown) * self.beyond_mean).sum((-2, 2))

    def _project(self, resid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch head pos width], a key and a value for every query's head."""
        q, k, v = (rearrange(at_least_float32(x), "b p h e -> b h p e") for x in self.attn.project(self.ln(resid), self.rotate))
        group = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def _products(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        return self.attn.cfg.attention_scale * (q @ k.mT)

    def _masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.visible, float("-inf"))

    def _softmax(self, scores: Tensor) -> Tensor:
        """Over the keys, and a sink beside them, whose share is left out."""
        if self.attn.sink is None:
            return scores.softmax(-1)
        sink = at_least_float32(self.attn.sink)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
