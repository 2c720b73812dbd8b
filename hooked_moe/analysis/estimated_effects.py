"""The tables of a budgeted run as an effect table: every removal with an estimated effect, unbiased over which ones were drawn.

Whatever is linear in effects is right of these: means, savings, sums by document. Nothing else is: one removal's estimated effect
is the cheap estimate, or, where it was drawn, that and many times what it missed. So orders within a position, spreads, shares of
variance and tests of single positions are not made of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_moe.statistics.difference_estimates import corrections, error_ratios, fold_of, size_bin
from hooked_moe.statistics.removal_sample import RemovalSample, gap_term, removal_size
from hooked_moe.tables import read_parquet, required_file
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks

ESTIMATES, SAMPLED, DRAW = "estimates.parquet", "sampled_effects.parquet", "draw.parquet"
EFFECTS = ("delta_loss", "kl")
_COLUMNS = ("expert", "routing_weight", "output_norm", "gap_norm", "first_order", "first_order_curved")


@dataclass(frozen=True)
class EstimatedGrid:
    """Some positions, with what says how uncertain the estimated effects are."""

    observed: EffectGrid
    """All positions; no effects."""
    effects: EffectGrid
    """Those with a next token; `delta_loss` and `kl` are estimated effects."""
    drawn: Bool[np.ndarray, "P L K"]
    variance: dict[str, Float[np.ndarray, "P L K"]]
    """By effect: error^2 (1 - p) / p^2 of the removals drawn, 0 of all others."""
    spread: Float[np.ndarray, "P L K"]
    """size^2 (1 - p) / p of every removal."""
    bin: Int[np.ndarray, "P L K"]
    """Of its size."""


class BudgetedTables:
    """The estimates, the sample and the draw of a run, read together and checked against each other."""

    def __init__(self, run: Path) -> None:
        """Raises FileNotFoundError where one is missing, ValueError where they are not of one measurement."""
        self.path = required_file(run, ESTIMATES, "`hooked-moe audit --budget` writes it")
        self.sample, self.layers, self.n_removals = _read_draw(run)
        self._drawn = _Drawn(run)
        self._learn()

    @property
    def n_drawn(self) -> int:
        return len(self._drawn.key)

    def chunks(self) -> Iterator[EstimatedGrid]:
        """All positions in order."""
        for observed in self._observed():
            yield self._estimated(observed)

    def _observed(self) -> Iterator[EffectGrid]:
        return effect_chunks(self.path, _COLUMNS, effect="first_order_curved")

    def _learn(self) -> None:
        """The coefficients of the corrections, and the variance model, from the removals drawn."""
        pieces = []
        for observed in self._observed():
            grid = observed.measured()
            assert grid.first_order is not None
            at, _ = self._drawn.of(grid)
            columns = (grid.first_order[at], self._features(grid)[at], self._size(grid)[at], fold_of(grid.document)[at[0]])
            pieces.append(np.column_stack(columns))
        base, bend, gap, size, fold = np.concatenate(pieces).T
        if len(base) != self.n_drawn:
            raise ValueError(f"{SAMPLED} has removals at positions that {ESTIMATES} lacks: they are not of one run")
        features, fold = np.stack([bend, gap], axis=1), fold.astype(np.int64)
        axis, probability = self._drawn.axis, self._drawn.probability
        self._coefficients, self.ratios = {}, {}
        for effect in EFFECTS:
            missed = self._drawn.effects[effect] - (base if effect == "delta_loss" else 0.0)
            own = corrections(missed, features, probability, size, axis, fold, len(self.layers))
            error = missed - (features * own[axis, fold]).sum(axis=1)
            self._coefficients[effect] = own
            self.ratios[effect] = error_ratios(error, probability, size, axis, len(self.layers))

    def _size(self, grid: EffectGrid) -> Float[np.ndarray, "P L K"]:
        assert grid.first_order is not None
        assert grid.gap_norm is not None
        return removal_size(grid.first_order, grid.delta_loss, grid.gap_norm, self.sample.gap_scale[None, :, None])

    def _features(self, grid: EffectGrid) -> Float[np.ndarray, "P L K feature"]:
        """What corrections are made of: the curvature's part of the estimate, and the square of the gap norm, in nats."""
        assert grid.first_order is not None
        assert grid.gap_norm is not None
        bend = grid.delta_loss.astype(np.float64) - grid.first_order
        return np.stack([bend, gap_term(grid.gap_norm, self.sample.gap_scale[None, :, None])], axis=-1)

    def _estimated(self, observed: EffectGrid) -> EstimatedGrid:
        grid = observed.measured()
        at, picks = self._drawn.of(grid)
        size, features, axis = self._size(grid), self._features(grid), np.arange(len(self.layers))[None, :, None]
        probability = self.sample.probability(axis, grid.expert, size)
        p = self._drawn.probability[picks]
        if not np.allclose(p, probability[at], rtol=1e-6):
            raise ValueError(f"the probabilities of {SAMPLED} are not those that {DRAW} gives: they are not of one run")
        values, variance = {}, {}
        for effect in EFFECTS:
            own = self._coefficients[effect][axis, fold_of(grid.document)[:, None, None]]
            estimate = (features * own).sum(axis=-1)
            if effect == "delta_loss":
                estimate += grid.first_order
            error = self._drawn.effects[effect][picks] - estimate[at]
            variance[effect] = np.zeros(estimate.shape)
            variance[effect][at] = error**2 * (1 - p) / p**2
            estimate[at] += error / p
            values[effect] = estimate
        drawn = np.zeros(size.shape, bool)
        drawn[at] = True
        spread = size**2 * (1 - probability) / probability
        effects = replace(grid, **values)
        return EstimatedGrid(observed, effects, drawn, variance, spread, size_bin(size))


class _Drawn:
    """The removals that were made, in the order of the table."""

    def __init__(self, run: Path) -> None:
        table = read_parquet(required_file(run, SAMPLED, "`hooked-moe audit --budget` writes it"))
        columns = {name: table[name].to_numpy() for name in table.column_names}
        self.key = columns["document"].astype(np.int64) << 32 | columns["position"]
        self.layer, self.slot = columns["layer"], columns["slot"].astype(np.int64)
        self.expert, self.probability = columns["expert"], columns["inclusion_probability"].astype(np.float64)
        self.effects = {effect: columns[effect].astype(np.float64) for effect in EFFECTS}
        self.axis = np.searchsorted(np.unique(self.layer), self.layer)
        if not len(self.key) or np.any(np.diff(self.key) < 0):
            raise ValueError(f"{run / SAMPLED} has no rows, or they are not in order: measure the run again")
        for effect, values in self.effects.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{run / SAMPLED} has {effect} that is no number; the measurement is broken there")

    def of(self, grid: EffectGrid) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], slice]:
        """Where in the grid [position, layer, slot] removals were drawn, and which rows of the table these are."""
        key = grid.document.astype(np.int64) << 32 | grid.position
        if not len(key):
            empty = np.zeros(0, np.int64)
            return (empty, empty, empty), slice(0, 0)
        first, last = np.searchsorted(self.key, [key[0], key[-1] + 1])
        rows = slice(int(first), int(last))
        position = np.minimum(np.searchsorted(key, self.key[rows]), len(key) - 1)
        axis = np.searchsorted(grid.layers, self.layer[rows])
        at = (position, axis, self.slot[rows])
        if not (np.array_equal(key[position], self.key[rows]) and np.array_equal(grid.expert[at], self.expert[rows])):
            raise ValueError(f"{SAMPLED} removes other experts than {ESTIMATES} has at the same tokens: they are not of one run")
        self.axis[rows] = axis
        return at, rows


def _read_draw(run: Path) -> tuple[RemovalSample, tuple[int, ...], Int[np.ndarray, "layer expert"]]:
    table = read_parquet(required_file(run, DRAW, "`hooked-moe audit --budget` writes it"))
    layers = np.unique(table["layer"].to_numpy())
    by_layer = {name: table[name].to_numpy().reshape(len(layers), -1) for name in table.column_names}
    sample = RemovalSample(by_layer["gap_scale"][:, 0], by_layer["least_probability"], float(by_layer["factor"][0, 0]))
    return sample, tuple(layers.tolist()), by_layer["n_removals"]
