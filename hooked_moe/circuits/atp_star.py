"""AtP* (Kramár et al. 2024, arXiv 2403.00745): attribution patching whose two known false negatives are mended.

The QK fix computes later attention patterns exactly (`attention_fix`). GradDrop takes the estimate once for every layer, with no
gradient through what that layer writes, and the mean of the estimates' sizes: a direct and an indirect effect that cancel do so
no longer. What comes out is an importance, never negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.attention_fix import pattern_terms
from hooked_moe.circuits.gradients import along, block_gradients
from hooked_moe.circuits.pairs import ExpertDeltas, PromptPair


def with_pattern_terms(
    pair: PromptPair, metric: Any, by_layer: dict[int, ExpertDeltas]
) -> dict[int, Float[Tensor, "batch pos slot"]]:
    """The first order of every patch, with later patterns exact."""
    return {layer: values[0] for layer, values in _estimates(pair, metric, by_layer, [None]).items()}


def atp_star(pair: PromptPair, metric: Any, by_layer: dict[int, ExpertDeltas]) -> dict[int, Float[Tensor, "batch pos slot"]]:
    """The importance of every patch: the mean size of the estimates without each other layer."""
    n_layers = pair.model.cfg.n_layers
    if n_layers == 1:
        return {layer: values.abs() for layer, values in with_pattern_terms(pair, metric, by_layer).items()}
    estimates = _estimates(pair, metric, by_layer, list(range(n_layers)))
    importance = {}
    for layer, values in estimates.items():
        others = torch.arange(n_layers, device=values.device) != layer  # without its own layer, a patch does nothing
        importance[layer] = values[others].abs().mean(0)
    return importance


def _estimates(
    pair: PromptPair, metric: Any, by_layer: dict[int, ExpertDeltas], dropped: Sequence[int | None]
) -> dict[int, Float[Tensor, "dropped batch pos slot"]]:
    passes = [block_gradients(pair, metric, one) for one in dropped]
    written = {
        layer: torch.stack([between[layer] * (layer != one) for one, (_, between) in zip(dropped, passes, strict=True)])
        for layer in range(pair.model.cfg.n_layers)
    }
    terms = pattern_terms(pair, by_layer, written)
    return {
        layer: torch.stack([along(deltas.delta, after[layer]) for after, _ in passes]) + terms[layer]
        for layer, deltas in by_layer.items()
    }
