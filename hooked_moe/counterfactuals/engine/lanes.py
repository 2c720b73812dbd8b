"""Where variants lie while they travel: which part of one tensor each layer fills."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.windows import Windows

Variants = Float[Tensor, "variant batch token d_model"]
Part = Float[Tensor, "own_variant batch own_token d_model"]


@dataclass(frozen=True)
class Lanes:
    """A tensor [variant, batch, token, d_model] is filled layer by layer, along its first axis or along its tokens."""

    sizes: Mapping[int, int]
    """How much of the axis each layer fills, by layer, in order."""
    axis: Literal[0, 2]
    """0: every layer has variants of its own, at the same tokens. 2: there is one variant, and every layer has its own tokens."""

    @classmethod
    def of_variants(cls, layers: list[int], n_variants: int) -> Lanes:
        """`n_variants` of each layer."""
        return cls(dict.fromkeys(layers, n_variants), 0)

    @property
    def split(self) -> tuple[int, int]:
        """The first axis as layers and their variants."""
        return (len(self.sizes), next(iter(self.sizes.values()), 0)) if self.axis == 0 else (1, 1)

    def entered(self, variants: Variants, layer: int) -> Part:
        """What the layers before this one have filled."""
        return variants.narrow(self.axis, 0, self._before(layer))

    def entering(self, variants: Variants, layer: int) -> Part:
        """What this layer fills."""
        return variants.narrow(self.axis, self._before(layer), self.sizes[layer])

    def tokens_entering(self, by_token: Int[Tensor, "batch token"], layer: int) -> Int[Tensor, "batch own"]:
        """What there is of every token, such as its position, at those at which this layer branches."""
        return by_token if self.axis == 0 else by_token.narrow(1, self._before(layer), self.sizes[layer])

    def under_way(self, variants: Variants, windows: Windows, layer: int, tokens: int) -> Iterator[tuple[Part, Windows]]:
        """What has entered before this layer, with its windows: where layers have their own tokens, a few of a row at a time."""
        entered = self.entered(variants, layer)
        if self.axis == 0:
            yield entered, windows
            return
        assert windows.starts is not None, "every layer has its own tokens"
        assert windows.width == 1, "tokens of each layer's own are single ones"
        starts = windows.starts[:, : entered.shape[2]]
        for part, own in zip(entered.split(tokens, dim=2), starts.split(tokens, dim=1), strict=True):
            yield part, Windows(own)

    def _before(self, layer: int) -> int:
        return sum(size for earlier, size in self.sizes.items() if earlier < layer)
