"""The loss as a function of the final residual stream: its gradient, and what a step along the stream does beyond it.

With p the prediction and W the unembedding, a shift d of the stream after the final norm moves the loss by

    log sum_v p_v exp(W_v . d) - W_target . d

The sum is taken over the `LIKELY_TOKENS` most likely tokens, and over all others as one token: their probability together, with
the mean of their rows, weighted by probability. Its gradient at d = 0 is that of the loss without any approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.config import HookedMoEConfig
from hooked_moe.kernels.target_loss import chunk_bytes
from hooked_moe.transformer import Transformer

LIKELY_TOKENS = 64
"""Tokens whose probability is followed one by one; the others are followed together."""

LOSSES_PER_CHUNK = 256
"""Tokens whose logits and their gradients are in memory together."""


@dataclass(frozen=True)
class LossHead:
    """The loss at final residual streams, wherever there is a next token."""

    model: Transformer
    targets: Int[Tensor, "batch pos"]
    """The next token; -1 where there is none: there, all the rest is zero."""
    resid: Float[Tensor, "batch pos d_model"]
    gradient: Float[Tensor, "batch pos d_model"]
    """Of each position's loss, with respect to its stream, in the dtype of the stream."""
    likely: Int[Tensor, "batch pos token"]
    rest: Float[Tensor, "batch pos d_model"]
    """The mean row of the unembedding over all other tokens."""
    log_p: Float[Tensor, "batch pos token+1"]
    """Log-probabilities of the likely tokens, and last that of all others together."""

    @classmethod
    def of(cls, model: Transformer, resid: Float[Tensor, "batch pos d_model"], targets: Int[Tensor, "batch pos"]) -> LossHead:
        """The head at these streams. The cost is that of two unembeddings."""
        n_likely = min(LIKELY_TOKENS, model.cfg.d_vocab)
        wide = at_least_float32(resid)
        head = cls(
            model,
            targets,
            resid,
            gradient=torch.zeros_like(resid),
            likely=targets.new_zeros(*targets.shape, n_likely),
            rest=torch.zeros_like(wide),
            log_p=wide.new_zeros(*targets.shape, n_likely + 1),
        )
        weight = at_least_float32(model.unembed.W_U.detach())
        for rows in (targets >= 0).nonzero().split(LOSSES_PER_CHUNK):
            batch, pos = rows.unbind(-1)
            head._fill(batch, pos, weight)
        return head

    def _fill(self, batch: Int[Tensor, " n"], pos: Int[Tensor, " n"], weight: Float[Tensor, "d_vocab d_model"]) -> None:
        x = at_least_float32(self.resid[batch, pos]).requires_grad_()
        with torch.enable_grad():
            normalised = self.model.ln_final(x)
        with torch.no_grad():
            p = (normalised @ weight.T).softmax(-1)
            p_likely, likely = p.topk(self.likely.shape[-1])
            p.scatter_(1, likely, 0.0)
            p_rest, weighted = p.sum(-1, keepdim=True), p @ weight
            upstream = weighted - weight[self.targets[batch, pos]]
            upstream += (p_likely.unsqueeze(1) @ weight[likely]).squeeze(1)
        (gradient,) = torch.autograd.grad(normalised, x, upstream)
        self.gradient[batch, pos] = gradient.to(self.gradient.dtype)
        self.likely[batch, pos] = likely
        self.rest[batch, pos] = weighted / p_rest.clamp(min=torch.finfo(p_rest.dtype).tiny)
        self.log_p[batch, pos] = torch.cat((p_likely, p_rest), dim=-1).log()

    def tensors(self) -> Mapping[str, Tensor]:
        """All that it keeps of the streams: what another head of the same model and targets can be made of."""
        return {name: getattr(self, name) for name in ("resid", "gradient", "likely", "rest", "log_p")}

    @torch.no_grad()
    def beyond_gradient(self, steps: Float[Tensor, "batch pos slot d_model"]) -> Float[Tensor, "batch pos slot"]:
        """The change of the loss when the stream moves by each step, minus the gradient along it, in nats."""
        beyond = steps.new_zeros(steps.shape[:-1])
        width = self.log_p.shape[-1] + 3 * steps.shape[2]  # vectors of d_model numbers that a position takes
        rows_per_chunk = max(1, chunk_bytes(steps.device) // (width * steps.shape[-1] * steps.itemsize))
        for rows in (self.targets >= 0).nonzero().split(rows_per_chunk):
            batch, pos = rows.unbind(-1)
            beyond[batch, pos] = self._beyond(batch, pos, steps[batch, pos])
        return beyond

    def _beyond(
        self, batch: Int[Tensor, " n"], pos: Int[Tensor, " n"], steps: Float[Tensor, "n slot d_model"]
    ) -> Float[Tensor, "n slot"]:
        norm, unembedding = self.model.ln_final, self.model.unembed.W_U
        x = at_least_float32(self.resid[batch, pos]).unsqueeze(1)
        shift = norm(x + steps) - norm(x)
        likely = self.likely[batch, pos]
        rows = at_least_float32(unembedding.index_select(0, likely.flatten())).unflatten(0, likely.shape)
        moved_logits = torch.cat((shift @ rows.mT, shift @ self.rest[batch, pos].unsqueeze(-1)), dim=-1)
        log_p = self.log_p[batch, pos].unsqueeze(1)
        moved = (log_p + moved_logits).logsumexp(-1) - log_p.logsumexp(-1)
        target = at_least_float32(unembedding[self.targets[batch, pos]]).unsqueeze(-1)
        along = at_least_float32(self.gradient[batch, pos]).unsqueeze(-1)
        return moved - (shift @ target + steps @ along).squeeze(-1)


def head_bytes(cfg: HookedMoEConfig) -> int:
    """Bytes of one position of `LossHead.tensors`."""
    size, wide = cfg.dtype.itemsize, max(cfg.dtype.itemsize, 4)
    return 2 * size * cfg.d_model + wide * cfg.d_model + LIKELY_TOKENS * 8 + (LIKELY_TOKENS + 1) * wide
