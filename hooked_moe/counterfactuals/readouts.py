"""What can be read off a counterfactual besides its loss: how far the prediction moved, and where.

    expert_effects(model, tokens, readouts=[KL(), LogitDifference(" he", " she"), Displacement(), LossAfter(3)])

Each gives the difference that the change made, for every variant and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.checks import as_int_or_none, described, whole_number
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.losses import loss_at
from hooked_moe.counterfactuals.engine.readout import Final
from hooked_moe.transformer import Transformer

CHUNK_BYTES = 16 << 20
"""Bytes of logits that are in memory at a time, the variants' and the clean run's alike."""


@dataclass(frozen=True)
class KL:
    """`KL(clean || changed)` of the next-token distributions at the position, in nats."""

    name: ClassVar[str] = "kl"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        variants, clean = final.at_window_starts(final.variants).flatten(1, 2), final.at_window_starts(final.clean).flatten(0, 1)
        result = torch.empty(variants.shape[:2], dtype=torch.promote_types(variants.dtype, torch.float32), device=variants.device)
        for part in _chunks(final.model, len(clean)):
            expected = _log_probabilities(final.model, clean[part])
            for row, variant in zip(result, variants, strict=True):
                changed = _log_probabilities(final.model, variant[part])
                row[part] = (expected.exp() * (expected - changed)).sum(-1)
        return result.unflatten(1, final.at_window_starts(final.clean).shape[:2])


@dataclass(frozen=True)
class LogitDifference:
    """The change of `logit(first) - logit(second)` at the position. Tokens are ids, or one-token texts."""

    first: int | str
    second: int | str
    name: str = "logit_difference"
    width: ClassVar[int] = 1

    def check(self, model: Transformer) -> None:
        """Raise `ValueError` unless both are tokens of the model."""
        self._ids(model)

    def _ids(self, model: Transformer) -> list[int]:
        ids = []
        for token in (self.first, self.second):
            number = model.require_tokenizer().to_single_token(token) if isinstance(token, str) else as_int_or_none(token)
            if number is None:
                raise ValueError(f"LogitDifference takes token ids or one-token texts, not {described(token)}")
            if not 0 <= number < model.cfg.d_vocab:
                raise ValueError(f"token id {number} is out of range: the model has ids 0 to {model.cfg.d_vocab - 1}")
            ids.append(number)
        return ids

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        model = final.model
        first, second = self._ids(model)
        direction = at_least_float32(model.unembed.W_U[first]) - at_least_float32(model.unembed.W_U[second])
        clean = model.ln_final(at_least_float32(final.at_window_starts(final.clean))) @ direction
        changed = [model.ln_final(at_least_float32(variant)) @ direction for variant in final.at_window_starts(final.variants)]
        return torch.stack(changed) - clean


@dataclass(frozen=True)
class Displacement:
    """How far the last residual stream (before the final norm) moved at the position: the Euclidean norm of the difference."""

    name: ClassVar[str] = "displacement"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        clean = at_least_float32(final.at_window_starts(final.clean))
        return torch.stack(
            [(at_least_float32(variant) - clean).norm(dim=-1) for variant in final.at_window_starts(final.variants)]
        )


@dataclass(frozen=True)
class LossAfter:
    """The change of the loss at the position and at each of the `tokens` after it, in nats: [..., tokens + 1].

    The window's tokens go through the layers with the changed one, at `tokens + 1` times the cost. nan past the end.
    """

    tokens: int
    name: str = "loss_after"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", whole_number(self.tokens, "the number of tokens that LossAfter takes"))
        if self.tokens < 0:
            raise ValueError(f"LossAfter takes a number of tokens from 0, not {self.tokens}")

    @property
    def width(self) -> int:
        return self.tokens + 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query offset"]:
        clean = loss_at(final.model, final.clean[None], final.targets)
        changed = loss_at(final.model, final.variants, final.targets) - clean
        return changed.unflatten(2, (-1, final.width))[..., : self.width]


def _chunks(model: Transformer, rows: int) -> Iterator[slice]:
    chunk_size = max(1, CHUNK_BYTES // (4 * model.cfg.d_vocab))
    for start in range(0, rows, chunk_size):
        yield slice(start, start + chunk_size)


def _log_probabilities(model: Transformer, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    return model.logits(resid[None])[0].log_softmax(-1)
