"""What can be read off a counterfactual besides its loss: how far the prediction moved, and where.

    expert_effects(model, tokens, readouts=[KL(), LogitDifference(" he", " she"), Displacement(), LossAfter(3)])

Each gives the difference that the change made, for every variant and position. `At` and `After` (`later_readouts`) take another
readout at a later token than the changed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none, described, whole_number
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals.engine.losses import loss_at
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.readout import Final
from hooked_moe.transformer import Transformer

CHUNK_BYTES = 16 << 20
"""Bytes of logits that are in memory at a time, the variants' and the clean run's alike; or of variants in float32."""


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
class Loss:
    """The change of the loss at the position, in nats: what `delta_loss` is, for use in `At` and `After`."""

    name: ClassVar[str] = "loss"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        targets = final.targets[:, :: final.width]
        clean = loss_at(final.model, final.at_window_starts(final.clean)[None], targets)
        return loss_at(final.model, final.at_window_starts(final.variants), targets) - clean


Token = int | str | tuple[int | str, ...]
"""A token id or a one-token text; or one for each batch row."""


@dataclass(frozen=True)
class LogitDifference:
    """The change of `logit(first) - logit(second)` at the position.

    Tokens are ids, or one-token texts; or a row of them, one for each batch row.
    """

    first: Token | Sequence[int | str] | Int[Tensor, " batch"]
    second: Token | Sequence[int | str] | Int[Tensor, " batch"]
    name: str = "logit_difference"
    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for side in ("first", "second"):
            object.__setattr__(self, side, _hashable(getattr(self, side)))

    def check(self, model: Transformer, packed: Packed) -> None:
        """Raise `ValueError` unless all are tokens of the model, one or as many as there are rows."""
        for tokens in (self.first, self.second):
            if isinstance(tokens, tuple) and len(tokens) != len(packed.rows):
                raise ValueError(
                    f"LogitDifference has {len(tokens)} tokens for {len(packed.rows)} batch rows: give one, or one for each row"
                )
        self.direction(model, packed.rows)

    def direction(self, model: Transformer, rows: Int[Tensor, " row"]) -> Float[Tensor, "#row d_model"]:
        """What the normalised last residual stream is multiplied by, for some batch rows."""
        first, second = self.directions(model, rows)
        return first - second

    def directions(
        self, model: Transformer, rows: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "#row d_model"], Float[Tensor, "#row d_model"]]:
        """The rows of the unembedding for both tokens."""
        tokens = (_ids_by_row(model, each, rows) for each in (self.first, self.second))
        first, second = (at_least_float32(model.unembed.W_U[ids]) for ids in tokens)
        return first, second

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query"]:
        direction = self.direction(final.model, final.packed.rows)

        def logits(resid: Float[Tensor, "variant batch query d_model"]) -> Float[Tensor, "variant batch query"]:
            x = final.model.ln_final(at_least_float32(resid))
            return x @ direction[0] if len(direction) == 1 else (x * direction[:, None]).sum(-1)

        clean, variants = final.at_window_starts(final.clean)[None], final.at_window_starts(final.variants)
        together = max(1, CHUNK_BYTES // (4 * max(1, clean.numel())))
        return torch.cat([logits(part) for part in variants.split(together)]) - logits(clean)


def _hashable(tokens: Any) -> Any:
    """A row of tokens as a tuple; anything else as it is."""
    if isinstance(tokens, str) or not (isinstance(tokens, Sequence) or getattr(tokens, "ndim", 0) == 1):
        return tokens
    return tuple(tokens.tolist() if hasattr(tokens, "tolist") else tokens)


def _ids_by_row(model: Transformer, tokens: Any, rows: Int[Tensor, " row"]) -> Int[Tensor, " #row"]:
    """The ids for some batch rows; a single one where all have the same."""
    if not isinstance(tokens, tuple):
        return torch.tensor([_id(model, tokens)], dtype=torch.int64, device=rows.device)
    return torch.tensor([_id(model, tokens[row]) for row in rows.tolist()], dtype=torch.int64, device=rows.device)


def _id(model: Transformer, token: Any) -> int:
    number = model.require_tokenizer().to_single_token(token) if isinstance(token, str) else as_int_or_none(token)
    if number is None:
        raise ValueError(f"LogitDifference takes token ids or one-token texts, not {described(token)}")
    if not 0 <= number < model.cfg.d_vocab:
        raise ValueError(f"token id {number} is out of range: the model has ids 0 to {model.cfg.d_vocab - 1}")
    return number


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
