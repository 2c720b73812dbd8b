"""Which tokens of a row are run for each queried position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import gather_positions


@dataclass(frozen=True)
class Windows:
    """Which tokens are run: for each query of a row, the one at its start and `width - 1` after it.

    Windows lie in one axis, "token": query 0's tokens, then query 1's, ... What reaches over the end of the row repeats its
    last token, and counts for nothing.
    """

    starts: Int[Tensor, "batch query"] | None
    """Packed positions. None: every position of the row, in order."""
    width: int = 1

    def token_positions(self, batch: int, length: int, device: torch.device) -> Int[Tensor, "batch token"] | None:
        """The packed position of every token; None for all positions in order."""
        if self.starts is None and self.width == 1:
            return None
        starts = torch.arange(length, device=device).expand(batch, length) if self.starts is None else self.starts
        return (starts[..., None] + torch.arange(self.width, device=device)).clamp(max=length - 1).flatten(1)

    def targets(self, targets: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch token"]:
        """The next token of every token; -1 where there is none, or over the end of the row."""
        positions = self.token_positions(targets.shape[0], targets.shape[1], targets.device)
        of_tokens = gather_positions(targets, positions)
        if positions is not None and self.width > 1:
            by_query = positions.unflatten(1, (-1, self.width))
            beyond = by_query.diff(dim=-1, prepend=by_query[..., :1] - 1) == 0
            of_tokens = of_tokens.masked_fill(beyond.flatten(1), -1)
        return of_tokens
