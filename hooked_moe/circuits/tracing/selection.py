"""Which expert carries the facts: chosen on one half of the cases, tested on the other.

Everything here is numpy: a choice, its controls, and intervals over cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from hooked_moe.circuits.tracing.protocol import Others, Search

BOOTSTRAPS = 5_000
SIGN_FLIPS = 10_000
CHUNK = 500
"""Resamples in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over cases, its 95% percentile-bootstrap interval, and the two-sided p of a sign-flip test of no effect."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def estimate(values: Float[np.ndarray, " case"], seed: int = 0) -> Estimate:
    """Cases are the unit. Raises `ValueError` for fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"{len(values)} cases: an interval needs at least two")
    mean = float(values.mean())
    if not values.any():
        return Estimate(0.0, 0.0, 0.0, 1.0, len(values))
    interval = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=BOOTSTRAPS, method="percentile", batch=CHUNK, rng=np.random.default_rng(seed)
    ).confidence_interval
    flips = scipy.stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        n_resamples=SIGN_FLIPS,
        vectorized=True,
        batch=CHUNK,
        rng=np.random.default_rng(seed),
    )
    return Estimate(mean, float(interval.low), float(interval.high), float(flips.pvalue), len(values))


def halves(n_cases: int, seed: int) -> Bool[np.ndarray, " case"]:
    """Which cases an expert is chosen on; the others test it."""
    order = np.random.default_rng(seed).permutation(n_cases)
    discovery = np.zeros(n_cases, dtype=bool)
    discovery[order[: n_cases // 2]] = True
    return discovery


@dataclass(frozen=True)
class ExpertGrid:
    """What single-expert patches did, dense: nothing where an expert is not active in the clean run.

    A case in which an expert is not active counts as zero for it.
    """

    rescue: Float[np.ndarray, "case layer expert"]
    active: Bool[np.ndarray, "case layer expert"]
    weight: Float[np.ndarray, "case layer expert"]

    def specificity(self, layer: int, expert: int, others: Others, seed: int) -> Float[np.ndarray, " case"]:
        """The expert's rescue minus the mean of the other active experts of its layer; with none, minus nothing."""
        own, active = self.rescue[:, layer, expert], self.active[:, layer].copy()
        active[:, expert] = False
        if others == "three":
            active = _drawn(active, 3, seed)
        count = active.sum(1)
        mean = (self.rescue[:, layer] * active).sum(1) / np.maximum(count, 1)
        result: Float[np.ndarray, " case"] = own - mean
        return result

    def weight_matched(self, layer: int, expert: int) -> Float[np.ndarray, " case"]:
        """The expert's rescue minus that of the active expert with the nearest routing weight; nan where it is not active."""
        distance = np.abs(self.weight[:, layer] - self.weight[:, layer, expert, None])
        distance[~self.active[:, layer]] = np.inf
        distance[:, expert] = np.inf
        nearest = distance.argmin(1)
        rows = np.arange(len(nearest))
        comparable = self.active[:, layer, expert] & np.isfinite(distance[rows, nearest])
        difference = self.rescue[rows, layer, expert] - self.rescue[rows, layer, nearest]
        return np.where(comparable, difference, np.nan)

    def rank(self, layer: int, expert: int) -> Float[np.ndarray, " case"]:
        """The expert's place by rescue among those active in its layer, from 1; nan where it is not active."""
        own = self.rescue[:, layer, expert, None]
        better = ((self.rescue[:, layer] > own) & self.active[:, layer]).sum(1)
        return np.where(self.active[:, layer, expert], 1.0 + better, np.nan)


def _drawn(active: Bool[np.ndarray, "case expert"], count: int, seed: int) -> Bool[np.ndarray, "case expert"]:
    """At most `count` of each case's experts."""
    order = np.where(active, np.random.default_rng(seed).random(active.shape), 2.0).argsort(1).argsort(1)
    drawn: Bool[np.ndarray, "case expert"] = active & (order < count)
    return drawn


@dataclass(frozen=True)
class Candidate:
    """An expert that is active often enough, and its mean rescue over the cases that it is chosen on."""

    layer: int
    expert: int
    active: int
    rescue: float
    place: str = "final"
    """Of `places.PLACES`: which token is patched."""


def best_first(found: Iterable[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda candidate: -candidate.rescue)


def candidates(
    grid: ExpertGrid,
    blocks: Float[np.ndarray, "case layer"],
    cases: Bool[np.ndarray, " case"],
    search: Search,
    recurrence: float,
) -> list[Candidate]:
    """Experts active in at least a share `recurrence` of the cases, the one with the largest mean rescue first.

    With "layer_first", only those of the layer whose block patch rescues most.
    """
    active = grid.active[cases].sum(0)
    mean = grid.rescue[cases].mean(0)
    allowed = active >= recurrence * cases.sum()
    if search == "layer_first":
        best = int(blocks[cases].mean(0).argmax())
        allowed[np.arange(len(allowed)) != best] = False
    found = [Candidate(int(i), int(e), int(active[i, e]), float(mean[i, e])) for i, e in zip(*allowed.nonzero(), strict=True)]
    return best_first(found)


def stability(
    grid: ExpertGrid,
    blocks: Float[np.ndarray, "case layer"],
    search: Search,
    seeds: Sequence[int],
    thresholds: Sequence[float],
) -> list[tuple[int, float, Candidate | None]]:
    """The expert that is chosen under other splits and other recurrences: (seed, recurrence, expert)."""
    chosen = []
    for seed in seeds:
        cases = halves(len(grid.rescue), seed)
        for threshold in thresholds:
            found = candidates(grid, blocks, cases, search, threshold)
            chosen.append((seed, threshold, found[0] if found else None))
    return chosen


def relation_folds(relations: Sequence[str], n_folds: int, seed: int) -> Int[np.ndarray, " case"]:
    """A fold for every case, all cases of a relation in the same one."""
    names = sorted(set(relations))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[place]: number % min(n_folds, len(names)) for number, place in enumerate(order)}
    return np.array([fold[relation] for relation in relations])
