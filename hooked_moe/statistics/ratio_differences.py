"""Differences of two ratios, with intervals from resampling documents: two runs over the same documents, or over different ones.

A saving is a ratio of sums over documents, so the difference of two runs is one of ratios, and its interval must resample both
numerators and denominators. Where both runs read the same documents, one draw serves both: what makes a document expensive in
both cancels, as in a paired t-test. Where they did not, each is drawn by itself, as in Welch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS, require_finite


@dataclass(frozen=True)
class RatioDifferences:
    """NaN where there is no interval."""

    estimate: Float[np.ndarray, " statistic"]
    low: Float[np.ndarray, " statistic"]
    high: Float[np.ndarray, " statistic"]
    low_together: Float[np.ndarray, " statistic"]
    """Lower ends of intervals that hold all their differences at once with this confidence."""
    high_together: Float[np.ndarray, " statistic"]


@dataclass(frozen=True)
class Ratios:
    """Sums by document: the ratio is sum(numerator) / sum(denominator)."""

    numerator: Num[np.ndarray, "document statistic"]
    denominator: Num[np.ndarray, "document statistic"]


def ratio_differences(
    first: Ratios, second: Ratios, *, paired: bool, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> RatioDifferences:
    """Ratios of `first` less those of `second`, many at once, each with a bootstrap-t interval over documents.

    `paired` says that document d of both is the same one. Each resample is studentised by its own linearised standard error,
    as in `ratio_bootstrap`, of which this is the form for two ratios. Those `_together` are of the largest |t| over all
    statistics of a resample (Westfall and Young, 1993): a difference whose interval excludes 0 there is one after correction
    for all of them. There is no interval with fewer than three documents, for differences without variance, and where a
    denominator is not positive in more resamples than lie beyond either end. Raises ValueError for values that are not
    finite, and for paired runs that differ in length.
    """
    for name, values in (("numerator", first.numerator), ("numerator", second.numerator)):
        require_finite(name, values)
    require_finite("denominator", np.concatenate([first.denominator, second.denominator]))
    if paired and len(first.numerator) != len(second.numerator):
        raise ValueError(f"paired runs have the same documents; got {len(first.numerator)} and {len(second.numerator)}")
    sides = [_Side(side) for side in (first, second)]
    estimate = sides[0].estimate - sides[1].estimate
    ends = np.full((4, len(estimate)), np.nan)
    if min(len(first.numerator), len(second.numerator)) >= MINIMUM_PAIRS:
        ends = _ends(sides, estimate, paired, (1 - confidence) / 2, n_resamples, seed)
    return RatioDifferences(estimate, *ends)


class _Side:
    """One run's ratios, and what resamples of its documents make of them."""

    def __init__(self, ratios: Ratios) -> None:
        over, self.under = (np.asarray(x, np.float64) for x in (ratios.numerator, ratios.denominator))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.estimate = over.sum(axis=0) / self.under.sum(axis=0)
            self.residual = np.nan_to_num(over - self.estimate * self.under)  # about the estimate, so that rounding is of it

    def drawn(self, weights: Float[np.ndarray, "resample document"]) -> tuple[np.ndarray, np.ndarray]:
        """Deviation of the ratio from its estimate, and the sum of denominators, by resample."""
        total = weights @ self.under
        return weights @ self.residual / total, total

    def squares(
        self, other: _Side, weights: np.ndarray, own: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """The sum over drawn documents of the product of both sides' linearised terms, whose square it is for one side alone."""
        (a, total_a), (b, total_b) = own, others
        product = weights @ (self.residual * other.residual) - b * (weights @ (self.residual * other.under))
        product += a * b * (weights @ (self.under * other.under)) - a * (weights @ (self.under * other.residual))
        return product / (total_a * total_b)


def _variance(sides: list[_Side], weights: list[np.ndarray], paired: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deviation of the difference, its squared standard error, and whether both denominators are positive, by resample."""
    drawn = [side.drawn(own) for side, own in zip(sides, weights, strict=True)]
    square = np.zeros_like(drawn[0][0])
    for side, own, values in zip(sides, weights, drawn, strict=True):
        n = own.shape[1]
        square = square + side.squares(side, own, values, values) * n / (n - 1)
    if paired:
        n = weights[0].shape[1]
        square = square - 2 * sides[0].squares(sides[1], weights[0], *drawn) * n / (n - 1)
    return drawn[0][0] - drawn[1][0], np.maximum(square, 0), (drawn[0][1] > 0) & (drawn[1][1] > 0)


def _ends(
    sides: list[_Side], estimate: np.ndarray, paired: bool, tail: float, n_resamples: int, seed: int
) -> Float[np.ndarray, "end statistic"]:
    random = np.random.default_rng(seed)
    counts = [len(side.under) for side in sides]
    weights = [random.multinomial(n, np.full(n, 1 / n), n_resamples).astype(np.float64) for n in counts[: 1 if paired else 2]]
    weights = weights * 2 if paired else weights
    ends = np.full((4, len(estimate)), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        _, square, _ = _variance(sides, [np.ones((1, n)) for n in counts], paired)
        se = np.sqrt(square[0])
        deviation, square, positive = _variance(sides, weights, paired)
        studentised = deviation / np.sqrt(square)
    studentised[(np.sqrt(square) <= 1e-6 * se) | ~positive] = np.nan  # one document drawn n times over has no error but rounding
    scale = sum(np.abs(side.estimate) for side in sides)
    defined = np.isfinite(estimate) & (se > 1e-12 * scale) & (np.mean(~positive, axis=0) <= tail)
    if not defined.any():
        return ends
    middle, error, t = estimate[defined], se[defined], studentised[:, defined]
    upper, lower = np.nanquantile(t, [1 - tail, tail], axis=0)
    largest = np.nanquantile(np.nanmax(np.where(np.isnan(t), -np.inf, np.abs(t)), axis=1), 1 - 2 * tail)
    ends[:, defined] = middle - upper * error, middle - lower * error, middle - largest * error, middle + largest * error
    return ends
