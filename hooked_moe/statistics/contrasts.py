"""Effects of two-level factors on a response, with the error that the runs in hand allow.

An effect is the mean at the high level less the mean at the low level. The unit is the run of one seed: what varies within a run
(documents, tokens) says nothing about how much another seed would change it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from jaxtyping import Float

from hooked_moe.statistics.multiplicity import holm
from hooked_moe.statistics.samples import DegenerateSample

Method = Literal["seeds", "lenth", "residual"]
EffectOutcome = Literal["effect", "negligible", "undecided"]
_MINIMUM_DF = 3


@dataclass(frozen=True)
class FactorEffects:
    """One entry a factor. `detectable` is the size that this many runs would find with 80% chance, at alpha over their number."""

    estimate: Float[np.ndarray, " factor"]
    low: Float[np.ndarray, " factor"]
    high: Float[np.ndarray, " factor"]
    p: Float[np.ndarray, " factor"]
    p_holm: Float[np.ndarray, " factor"]
    se: float
    df: float
    detectable: float
    n_runs: int
    n_seeds: int
    method: Method
    """seeds: runs of one design point differ by seed. lenth: one seed, all contrasts of the design. residual: least squares."""


def factor_effects(
    levels: Float[np.ndarray, "run factor"], y: Float[np.ndarray, "run seed"], alpha: float = 0.05
) -> FactorEffects:
    """Main effects of -1/+1 factors; NaN in `y` marks a run that was not made, or does not count.

    The error is that between seeds of the same run, after each seed's own mean, where all runs have two seeds or more; Lenth's
    pseudo standard error (1989) of all contrasts where an orthogonal design has one; else the residual of least squares on main
    effects and seeds, which then also holds what interactions there are.

    Raises `DegenerateSample` where the runs in hand cannot tell the factors apart, or leave no error to judge by.
    """
    values = np.asarray(y, np.float64)
    complete = not np.isnan(values).any()
    n_seeds = int((~np.isnan(values)).any(axis=0).sum())
    if complete and values.shape[1] >= 2:
        estimate, se, df = _between_seeds(levels, values)
        method: Method = "seeds"
    elif complete and _is_orthogonal(levels):
        estimate, se, df = _lenth_effects(levels, values[:, 0])
        method = "lenth"
    else:
        estimate, se, df = _least_squares(levels, values)
        method = "residual"
    t = np.abs(estimate) / se if se > 0 else np.where(estimate == 0, 0.0, np.inf)
    p = 2 * scipy.special.stdtr(df, -t)
    margin = scipy.special.stdtrit(df, 1 - alpha / 2) * se
    return FactorEffects(
        estimate,
        estimate - margin,
        estimate + margin,
        p,
        holm(p),
        se,
        df,
        detectable=se * detectable_t(df, alpha / len(estimate)),
        n_runs=int((~np.isnan(values)).sum()),
        n_seeds=n_seeds,
        method=method,
    )


def effect_outcome(low: float, high: float, p: float, bound: float, alpha: float = 0.05) -> EffectOutcome:
    """What may be said of a factor: "effect" where the corrected p is at most alpha, "negligible" where the 95% interval lies
    within the bound on either side, else "undecided"."""
    if p <= alpha:
        return "effect"
    return "negligible" if -bound <= low and high <= bound else "undecided"


def lenth(contrasts: Float[np.ndarray, " contrast"]) -> tuple[float, float]:
    """Pseudo standard error of unreplicated contrasts, most of which are taken to be noise, and its degrees of freedom.

    Lenth (1989), Technometrics 31: 1.5 times the median of those |contrasts| under 2.5 times 1.5 times the median of all; a third
    of their number.
    """
    size = np.abs(np.asarray(contrasts, np.float64))
    first = 1.5 * np.median(size)
    kept = size[size <= 2.5 * first] if first > 0 else size
    return float(1.5 * np.median(kept)), len(size) / 3


def detectable_t(df: float, alpha: float, power: float = 0.8) -> float:
    """The effect, in standard errors, that a two-sided t-test at level alpha finds with the given chance."""
    critical = scipy.special.stdtrit(df, 1 - alpha / 2)

    def found(size: float) -> float:
        return 1 - float(scipy.special.nctdtr(df, size, critical))

    top = critical + 1.0
    while found(top) < power:
        top *= 2
    return float(scipy.optimize.brentq(lambda size: found(size) - power, 0.0, top, xtol=1e-8))


def all_contrasts(levels: Float[np.ndarray, "run factor"]) -> Float[np.ndarray, "run contrast"]:
    """The columns of +-1 that are orthogonal to the mean and to each other: the factors first, then their products, in order."""
    columns = [levels[:, factor] for factor in range(levels.shape[1])]
    for order in range(2, levels.shape[1] + 1):
        for names in itertools.combinations(range(levels.shape[1]), order):
            if len(columns) == len(levels) - 1:
                return np.column_stack(columns)
            product = np.prod(levels[:, list(names)], axis=1)
            if not any(abs(float(product @ other)) > 0.5 for other in (*columns, np.ones(len(levels)))):
                columns.append(product)
    return np.column_stack(columns)


def _is_orthogonal(levels: Float[np.ndarray, "run factor"]) -> bool:
    X = np.column_stack([np.ones(len(levels)), levels])
    return len(levels) > levels.shape[1] and bool(np.array_equal(X.T @ X, len(X) * np.eye(X.shape[1])))


def _lenth_effects(levels: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, float]:
    contrasts = all_contrasts(levels).T @ y / (len(levels) / 2)
    se, df = lenth(contrasts)
    return contrasts[: levels.shape[1]], se, df


def _between_seeds(levels: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, float]:
    n_runs, n_seeds = y.shape
    error = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0, keepdims=True) + y.mean()
    df = (n_runs - 1) * (n_seeds - 1)
    deviation = float(np.sqrt((error**2).sum() / df))
    estimate, unit, _, _ = _solved(levels, y.mean(axis=1), np.ones((n_runs, 0)))
    return estimate, deviation / np.sqrt(n_seeds) * unit, float(df)


def _least_squares(levels: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, float]:
    run, seed = np.nonzero(~np.isnan(y))
    seeds = np.unique(seed)
    blocks = (seed[:, None] == seeds[None, 1:]).astype(np.float64)
    estimate, unit, residual, df = _solved(levels[run], y[run, seed], blocks)
    if df < _MINIMUM_DF:
        raise DegenerateSample(f"{len(run)} runs leave {df} degrees of freedom for an error; {_MINIMUM_DF} are needed")
    return estimate, float(np.sqrt((residual**2).sum() / df)) * unit, float(df)


def _solved(levels: np.ndarray, y: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, float, np.ndarray, int]:
    """Effects (twice the coefficients), the largest standard error of one in residual standard deviations, residuals, and df."""
    X = np.column_stack([np.ones(len(y)), levels, blocks])
    if np.linalg.matrix_rank(X) < X.shape[1]:
        raise DegenerateSample(f"{len(y)} runs cannot tell {levels.shape[1]} factors apart")
    inverse = np.linalg.inv(X.T @ X)
    solution = inverse @ X.T @ y
    own = slice(1, 1 + levels.shape[1])
    unit = 2 * float(np.sqrt(np.diag(inverse)[own].max()))
    return 2 * solution[own], unit, y - X @ solution, len(y) - X.shape[1]
