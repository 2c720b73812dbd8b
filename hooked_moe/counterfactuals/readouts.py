"""What can be read off a counterfactual besides its loss: how far the prediction moved, and where.

    expert_effects(model, tokens, readouts=[KL(), LogitDifference(" he", " she"), Displacement(), LossAfter(3)])

Each gives the difference that the change made, for every variant and position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.fan_out import Final, loss_at
from hooked_moe.transformer import Transformer

CHUNK_BYTES = 16 << 20
"""Logits of so many bytes at a time, of variants and of the clean run alike."""


@runtime_checkable
class NamedReadout(Protocol):
    """A readout: a name for its column, and how many tokens from the changed one on it needs."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query *rest"]: ...


@runtime_checkable
class ChecksModel(Protocol):
    """A readout that not every model has."""

    def check(self, model: Transformer) -> None:
        """Raise `ValueError` if this model does not have it: before anything is measured."""
        ...


def by_name(readouts: Any, model: Transformer) -> dict[str, NamedReadout]:
    """Readouts by their names. Raises `ValueError` for what is none, for names that occur twice, and for what the model lacks."""
    if not isinstance(readouts, Iterable) or isinstance(readouts, str):
        raise ValueError(f"readouts must be a list of readouts, as in [KL()], not {readouts!r}")
    named: dict[str, NamedReadout] = {}
    for readout in readouts:
        if isinstance(readout, type) or not isinstance(readout, NamedReadout):
            raise ValueError(f"readouts must be a list of readouts, as in [KL()]; {readout!r} is none")
        if readout.name in named:
            raise ValueError(f"readouts need different names; {readout.name!r} occurs twice")
        if isinstance(readout, ChecksModel):
            readout.check(model)
        named[readout.name] = readout
    return named


@dataclass(frozen=True)
class KL:
    """`KL(clean || changed)` of the next-token distributions at the position, in nats."""

    name: ClassVar[str] = "kl"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        variants, clean = final.first(final.variants).flatten(1, 2), final.first(final.clean).flatten(0, 1)
        result = torch.empty(variants.shape[:2], dtype=torch.promote_types(variants.dtype, torch.float32), device=variants.device)
        for part in _chunks(final.model, len(clean)):
            expected = _log_probabilities(final.model, clean[part])
            for row, variant in zip(result, variants, strict=True):
                changed = _log_probabilities(final.model, variant[part])
                row[part] = (expected.exp() * (expected - changed)).sum(-1)
        return result.unflatten(1, final.first(final.clean).shape[:2])


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
                raise ValueError(f"LogitDifference takes token ids or one-token texts, not {token!r}")
            if not 0 <= number < model.cfg.d_vocab:
                raise ValueError(f"token id {number} is out of range: the model has ids 0 to {model.cfg.d_vocab - 1}")
            ids.append(number)
        return ids

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        model = final.model
        first, second = self._ids(model)
        direction = at_least_float32(model.unembed.W_U[first]) - at_least_float32(model.unembed.W_U[second])
        clean = model.ln_final(at_least_float32(final.first(final.clean))) @ direction
        changed = [model.ln_final(at_least_float32(variant)) @ direction for variant in final.first(final.variants)]
        return torch.stack(changed) - clean


@dataclass(frozen=True)
class Displacement:
    """How far the last residual stream (before the final norm) moved at the position: the Euclidean norm of the difference."""

    name: ClassVar[str] = "displacement"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        clean = at_least_float32(final.first(final.clean))
        return torch.stack([(at_least_float32(variant) - clean).norm(dim=-1) for variant in final.first(final.variants)])


@dataclass(frozen=True)
class LossAfter:
    """The change of the loss at the position and at each of the `tokens` after it, in nats: [..., tokens + 1].

    The window's tokens go through the layers with the changed one, at `tokens + 1` times the cost. nan past the end.
    """

    tokens: int
    name: str = "loss_after"

    def __post_init__(self) -> None:
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
    at_once = max(1, CHUNK_BYTES // (4 * model.cfg.d_vocab))
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)


def _log_probabilities(model: Transformer, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    return model.logits(resid[None])[0].log_softmax(-1)
