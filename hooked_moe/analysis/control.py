"""How far the size of a position's contrast in routing weight tells the size of its contrast in loss: the rho of Tables 4-6.

Per layer, Spearman over positions of (highest weight / lowest weight) and (loss change without the highest - without the lowest).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy
from jaxtyping import Float

from hooked_moe.checks import pairs_of_numbers
from hooked_moe.tables.effect_grid import effect_chunks


def weight_ratio_correlations(effects: Path, positions: Iterable[tuple[int, int]] | None = None) -> dict[int, tuple[float, int]]:
    """Layer -> (rho, positions behind it), from effects.parquet; `positions` are (document, position), None means all measured.

    Keeps two numbers a position and layer. Raises `ValueError` where fewer than three of the positions were measured.
    """
    ratios: list[Float[np.ndarray, "position layer"]] = []
    contrasts: list[Float[np.ndarray, "position layer"]] = []
    layers: tuple[int, ...] = ()
    wanted = None if positions is None else set(pairs_of_numbers(positions, "positions", "(document, position)"))
    for chunk in effect_chunks(effects, ("expert", "delta_loss", "routing_weight")):
        grid = chunk.measured()
        if wanted is not None:
            keys = zip(grid.document.tolist(), grid.position.tolist(), strict=True)
            grid = grid.at_positions(np.array([key in wanted for key in keys], dtype=bool))
        assert grid.routing_weight is not None  # asked for above
        weight, delta = grid.routing_weight.astype(np.float64), grid.delta_loss.astype(np.float64)
        ratios.append(weight[..., 0] / (weight[..., -1] + 1e-9))  # a weight can be 0 in half precision
        contrasts.append(delta[..., 0] - delta[..., -1])
        layers = grid.layers
    ratio, contrast = np.concatenate(ratios), np.concatenate(contrasts)
    if len(ratio) < 3:
        raise ValueError(f"{effects} has {len(ratio)} of the positions asked for; a correlation needs 3")
    return {
        layer: (float(scipy.stats.spearmanr(ratio[:, axis], contrast[:, axis]).statistic), len(ratio))
        for axis, layer in enumerate(layers)
    }
