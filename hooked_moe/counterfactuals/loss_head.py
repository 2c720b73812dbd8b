"""The loss as a function of the final residual stream: its gradient, and what a step along the stream does beyond it.

With x the stream after the final norm, p the prediction and W the unembedding, a shift d of x moves the loss by

    log sum_v p_v exp(W_v . d) - W_target . d

The sum is taken over the `LIKELY_TOKENS` most likely tokens, and over all others as one token: their probability together, with
the mean of their rows, weighted by probability. Its gradient at d = 0 is that of the loss without any approximation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.kernels.target_loss import chunk_bytes
from hooked_moe.transformer import Transformer

LIKELY_TOKENS = 64
"""Tokens whose probability is followed one by one; the others are followed together."""

LOSSES_PER_CHUNK = 256
"""Tokens whose logits and their gradients are in memory together."""


class LossHead:
    """The loss at final residual streams, wherever there is a next token."""

    gradient: Float[Tensor, "batch pos d_model"]
    """Of each position's loss, with respect to its stream, in the dtype of the stream; zero where there is no next token."""

    def __init__(self, model: Transformer, resid: Float[Tensor, "batch pos d_model"], targets: Int[Tensor, "batch pos"]) -> None:
        self._model, self._resid, self._targets = model, resid, targets
        self.gradient = torch.zeros_like(resid)
        likely = min(LIKELY_TOKENS, model.cfg.d_vocab)
        self._tokens = targets.new_zeros(*targets.shape, likely)
        self._rest = torch.zeros_like(at_least_float32(resid))
        self._log_p = self._rest.new_zeros(*targets.shape, likely + 1)
        wide = at_least_float32(model.unembed.W_U.detach())
        for rows in (targets >= 0).nonzero().split(LOSSES_PER_CHUNK):
            self._learn(*rows.unbind(-1), wide)

    def _learn(self, batch: Int[Tensor, " n"], pos: Int[Tensor, " n"], weight: Float[Tensor, "d_vocab d_model"]) -> None:
        x = at_least_float32(self._resid[batch, pos]).requires_grad_()
        with torch.enable_grad():
            normalised = self._model.ln_final(x)
        with torch.no_grad():
            p = (normalised @ weight.T).softmax(-1)
            likely, tokens = p.topk(self._tokens.shape[-1])
            p.scatter_(1, tokens, 0.0)
            rest, weighted = p.sum(-1, keepdim=True), p @ weight
            upstream = weighted - weight[self._targets[batch, pos]]
            upstream += (likely.unsqueeze(1) @ weight[tokens]).squeeze(1)
        self._tokens[batch, pos] = tokens
        self._rest[batch, pos] = weighted / rest.clamp(min=torch.finfo(rest.dtype).tiny)
        self._log_p[batch, pos] = torch.cat((likely, rest), dim=-1).log()
        (gradient,) = torch.autograd.grad(normalised, x, upstream)
        self.gradient[batch, pos] = gradient.to(self.gradient.dtype)

    @torch.no_grad()
    def beyond_gradient(self, steps: Float[Tensor, "batch pos slot d_model"]) -> Float[Tensor, "batch pos slot"]:
        """The change of the loss when the stream moves by each step, minus the gradient along it, in nats."""
        beyond = steps.new_zeros(steps.shape[:-1])
        columns = self._log_p.shape[-1] + 3 * steps.shape[2]  # rows of d_model numbers that a position takes
        rows_per_chunk = max(1, chunk_bytes(steps.device) // (columns * steps.shape[-1] * steps.itemsize))
        for rows in (self._targets >= 0).nonzero().split(rows_per_chunk):
            batch, pos = rows.unbind(-1)
            beyond[batch, pos] = self._beyond(batch, pos, steps[batch, pos])
        return beyond

    def _beyond(
        self, batch: Int[Tensor, " n"], pos: Int[Tensor, " n"], steps: Float[Tensor, "n slot d_model"]
    ) -> Float[Tensor, "n slot"]:
        x, norm, unembedding = (
            at_least_float32(self._resid[batch, pos]).unsqueeze(1),
            self._model.ln_final,
            self._model.unembed.W_U,
        )
        shift = norm(x + steps) - norm(x)
        rows = torch.cat((at_least_float32(unembedding[self._tokens[batch, pos]]), self._rest[batch, pos].unsqueeze(1)), dim=1)
        log_p = self._log_p[batch, pos].unsqueeze(1)
        moved = (log_p + shift @ rows.mT).logsumexp(-1) - log_p.logsumexp(-1)
        target = at_least_float32(unembedding[self._targets[batch, pos]]).unsqueeze(-1)
        along = at_least_float32(self.gradient[batch, pos]).unsqueeze(-1)
        return moved - (shift @ target + steps @ along).squeeze(-1)
