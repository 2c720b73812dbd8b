"""What a question to the engine is. It says what changes; the engine finds out what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts
from hooked_moe.counterfactuals.engine.padding import Packed

Variants = Float[Tensor, "variant batch token d_model"]
"""Residual streams after a block, at every token of the windows."""


class Question(ABC):
    """A change at one token: how a layer's clean run branches into variants, for every query at once."""

    n_variants: int
    """How many variants there are of each layer and query."""
    layers_again: Collection[int] = ()
    """Later layers in which the variants are changed again."""

    @abstractmethod
    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        """The variants of one layer: its residual stream after the block, changed.

        `clean` is the clean run at the tokens of the windows, each of which starts at a query of `packed` and is `width` long.
        """

    def branch_again(self, own: CleanBlock, first: int, packed: Packed, width: int) -> Float[Tensor, "row token d_model"]:
        """The variants after a block of `layers_again`, changed: a row is one variant of one batch row, the first one's number is
        `first`, and `own` is what they computed in the block themselves, at the tokens of the windows."""
        raise NotImplementedError

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        """What is read off the clean run of a layer besides: columns [batch, pos, ...], at all positions."""
        return {}

    def see_end(self, resid: Float[Tensor, "batch packed d_model"], packed: Packed) -> None:  # noqa: B027 (few need it)
        """Is shown the clean run's last residual stream."""


class SequenceQuestion(ABC):
    """A change at every token of a sequence that goes to an expert: asked for each expert that the sequence uses."""

    n_variants: int
    """How many variants of a token there are in a layer: one for each of its slots."""

    @abstractmethod
    def without_experts(self, clean: CleanExperts, experts: Int[Tensor, " row"]) -> Float[Tensor, "row pos d_model"]:
        """The residual stream after the block without one expert in each row."""

    def observe(self, clean: CleanBlock) -> dict[str, Tensor]:
        """As in `Question`."""
        return {}
