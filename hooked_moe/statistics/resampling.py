"""Inference that resamples whole documents: bootstrap intervals and a sign-flip test over many cells at once.

All are matrix products of a table of resamples with a table of per-document sums, so their cost does not depend on how
many positions the documents have.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS, DegenerateSample, require_finite

_PATTERNS_PER_CHUNK = 1024


@dataclass(frozen=True)
class BootstrapInterval:
    estimate: Float[np.ndarray, " statistic"]
    se: Float[np.ndarray, " statistic"]
    low: Float[np.ndarray, " statistic"]
    high: Float[np.ndarray, " statistic"]
    n: int  # documents


def cluster_bootstrap(
    total: Num[np.ndarray, "document statistic"],
    count: Num[np.ndarray, " document"] | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> BootstrapInterval:
    """Means with intervals from resampling whole documents, for many statistics at once.

    `total` is each document's sum and `count` its number of observations: the estimate is the mean over observations,
    sum(total) / sum(count). Without `count` the totals are the observations and the estimate is their mean over
    documents. The interval is the bootstrap-t (Efron and Tibshirani, 1993, chapter 12): each resample is studentised by
    its own clustered standard error, which keeps the level with skew and few documents where percentiles fall short.

    Raises ValueError for NaN, infinite values and negative counts, DegenerateSample for fewer than three documents and
    for statistics that are alike in all documents.
    """
    sums = np.asarray(total, np.float64)
    documents = len(sums)
    weight = np.ones(documents) if count is None else np.asarray(count, np.float64)
    require_finite("total", sums)
    require_finite("count", weight)
    if documents < MINIMUM_PAIRS:
        raise DegenerateSample(f"{documents} documents; a bootstrap over documents needs at least {MINIMUM_PAIRS}")
    if weight.min() < 0 or weight.sum() == 0:
        raise ValueError(f"counts of observations must be 0 or more and not all 0, got {weight.min():g} to {weight.max():g}")
    estimate, se = _ratio(np.ones((1, documents)), sums, weight)
    if np.any(se[0] <= 1e-12 * np.abs(estimate[0])):
        raise DegenerateSample(f"statistic {int(np.argmin(se[0]))} is the same in all {documents} documents; no interval")
    random = np.random.default_rng(seed)
    drawn = random.multinomial(documents, np.full(documents, 1 / documents), size=n_resamples).astype(np.float64)
    drawn = drawn[drawn @ weight > 0]
    means, errors = _ratio(drawn, sums, weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = (means - estimate) / errors
    studentised[errors <= 1e-9 * se] = np.nan  # one document drawn n times over
    tail = (1 - confidence) / 2
    upper, lower = np.nanquantile(studentised, [1 - tail, tail], axis=0)
    return BootstrapInterval(estimate[0], se[0], estimate[0] - upper * se[0], estimate[0] - lower * se[0], documents)


def _ratio(
    drawn: Float[np.ndarray, "resample document"],
    total: Float[np.ndarray, "document statistic"],
    count: Float[np.ndarray, " document"],
) -> tuple[Float[np.ndarray, "resample statistic"], Float[np.ndarray, "resample statistic"]]:
    """sum(total) / sum(count) of each resample and its linearised clustered standard error, ddof=1 over documents."""
    weight = (drawn @ count)[:, None]
    mean = drawn @ total / weight
    residual = drawn @ total**2 - 2 * mean * (drawn @ (total * count[:, None])) + mean**2 * (drawn @ count**2)[:, None]
    documents = drawn.shape[1]
    return mean, np.sqrt(np.maximum(residual, 0) * documents / (documents - 1)) / weight


@dataclass(frozen=True)
class RatioInterval:
    """Any shape; NaN where there is no interval."""

    estimate: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]


_RATIOS_PER_CHUNK = 256


def ratio_bootstrap(
    numerator: Num[np.ndarray, "document *shape"],
    denominator: Num[np.ndarray, "document *#shape"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> RatioInterval:
    """sum(numerator) / sum(denominator) over documents, each with an interval from resampling documents jointly.

    `cluster_bootstrap` for many ratios at once, each with a denominator of its own, which may vary in sign: a cost as a share of
    another cost. The interval is the same bootstrap-t; the same resamples serve all ratios. There is none (NaN) with fewer than
    three documents, for ratios that are alike in all of them, and where the denominator is not positive in more resamples than
    lie beyond either end of the interval: a share of what may be nothing has no bounds.

    With tails as heavy and skewed as those of removals the nominal 95% interval of a saving's share misses it in 5 to 8% of runs,
    of 12 documents as of 48 (benchmarks/calibration.py).
    """
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    over, under = (np.broadcast_to(x, shape).reshape(shape[0], -1).astype(np.float64) for x in (numerator, denominator))
    require_finite("numerator", over)
    require_finite("denominator", under)
    documents, n = over.shape
    result = np.full((3, n), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        result[0] = over.sum(axis=0) / under.sum(axis=0)
    result[0, under.sum(axis=0) == 0] = np.nan
    if documents >= MINIMUM_PAIRS:
        random = np.random.default_rng(seed)
        drawn = random.multinomial(documents, np.full(documents, 1 / documents), size=n_resamples).astype(np.float64)
        for start in range(0, n, _RATIOS_PER_CHUNK):
            chunk = slice(start, start + _RATIOS_PER_CHUNK)
            result[1:, chunk] = _studentised_interval(drawn, over[:, chunk], under[:, chunk], (1 - confidence) / 2)
    estimate, low, high = (values.reshape(shape[1:]) for values in result)
    return RatioInterval(estimate, low, high)


def _studentised_interval(
    drawn: Float[np.ndarray, "resample document"],
    over: Float[np.ndarray, "document statistic"],
    under: Float[np.ndarray, "document statistic"],
    tail: float,
) -> Float[np.ndarray, "end statistic"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = over.sum(axis=0) / under.sum(axis=0)
        residual = over - estimate * under  # about the estimate, so that rounding is of the deviations
        _, (se,), _ = _deviations(np.ones((1, len(over))), residual, under)
        deviations, errors, positive = _deviations(drawn, residual, under)
        studentised = deviations / errors
    studentised[(errors <= 1e-6 * se) | ~positive] = np.nan  # one document drawn n times over has no error but rounding
    defined = (se > 1e-12 * np.abs(estimate)) & (np.mean(~positive, axis=0) <= tail)
    ends = np.full((2, len(estimate)), np.nan)
    if defined.any():
        upper, lower = np.nanquantile(studentised[:, defined], [1 - tail, tail], axis=0)
        ends[:, defined] = estimate[defined] - upper * se[defined], estimate[defined] - lower * se[defined]
    return ends


def _deviations(
    drawn: Float[np.ndarray, "resample document"],
    residual: Float[np.ndarray, "document statistic"],
    under: Float[np.ndarray, "document statistic"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio less estimate of each resample, its linearised clustered standard error, and whether the denominator is above 0."""
    total = drawn @ under
    deviation = drawn @ residual / total
    square = drawn @ residual**2 - 2 * deviation * (drawn @ (residual * under)) + deviation**2 * (drawn @ under**2)
    documents = len(residual)
    return deviation, np.sqrt(np.maximum(square, 0) * documents / (documents - 1)) / np.abs(total), total > 0


@dataclass(frozen=True)
class SignFlip:
    t: Float[np.ndarray, " test"]
    p: Float[np.ndarray, " test"]  # two-sided, each test by itself
    p_max: Float[np.ndarray, " test"]  # adjusted for all tests together (single-step max-T)
    n_patterns: int  # sign patterns behind the p
    exact: bool  # all patterns there are, rather than a random sample of them


def sign_flip_max_t(difference: Float[np.ndarray, "document test"], n_patterns: int = 10_000, seed: int = 0) -> SignFlip:
    """Sign-flip test of many paired comparisons over the same documents, corrected by the maximum of |t|.

    A row holds one document's mean differences, all of which keep or change their sign together, so the dependence
    between tests is kept; under the null a document's differences are as likely as their opposites. Family-wise error
    is controlled without Bonferroni's loss where tests are alike (Westfall and Young, 1993). NaN marks a test for which
    the document has no pair. All 2^documents patterns are used where that takes no more than `n_patterns` (by symmetry
    half as many are computed); else `n_patterns` random ones, p = (1 + count) / (1 + n_patterns).

    Raises ValueError for infinite values, DegenerateSample for a test with fewer than three documents or without
    variance.
    """
    absent = np.isnan(difference)
    values = np.where(absent, 0.0, np.asarray(difference, np.float64))
    require_finite("difference", values)
    n = (~absent).sum(axis=0).astype(np.float64)
    square = (values**2).sum(axis=0)
    if n.min() < MINIMUM_PAIRS:
        raise DegenerateSample(f"test {int(n.argmin())} has {int(n.min())} documents; a sign flip needs at least {MINIMUM_PAIRS}")

    def t_of(sums: Float[np.ndarray, "pattern test"]) -> Float[np.ndarray, "pattern test"]:
        # flipping keeps the sum of squares, so the sum alone determines t
        spread = np.maximum(square - sums**2 / n, np.finfo(np.float64).tiny)
        return sums * np.sqrt((n - 1) / n / spread)

    sums = values.sum(axis=0)
    if np.any(square - sums**2 / n <= 1e-12 * square):
        raise DegenerateSample("a test has the same difference in all documents; without variance there is no test")
    t = t_of(sums[None])[0]
    threshold = np.abs(t) * (1 - 1e-9)  # the observed pattern ties with itself, whatever the order of summation
    exact = len(values) <= np.log2(n_patterns)
    beyond, beyond_max, done = np.zeros(len(t)), np.zeros(len(t)), 0
    for signs in _all_signs(len(values)) if exact else _random_signs(len(values), n_patterns, seed):
        size = np.abs(t_of(signs @ values))
        beyond += (size >= threshold).sum(axis=0)
        highest = np.sort(size.max(axis=1))
        beyond_max += len(highest) - np.searchsorted(highest, threshold)
        done += len(signs)
    if exact:
        return SignFlip(t, beyond / done, beyond_max / done, 2 * done, True)
    return SignFlip(t, (1 + beyond) / (1 + done), (1 + beyond_max) / (1 + done), done, False)


def _all_signs(documents: int) -> Iterator[Float[np.ndarray, "pattern document"]]:
    """Every pattern with the first document's sign kept; the other half has the same |t|."""
    for start in range(0, 2 ** (documents - 1), _PATTERNS_PER_CHUNK):
        pattern = np.arange(start, min(start + _PATTERNS_PER_CHUNK, 2 ** (documents - 1)))
        yield 1.0 - 2.0 * (pattern[:, None] >> np.arange(documents)[::-1] & 1)


def _random_signs(documents: int, n_patterns: int, seed: int) -> Iterator[Float[np.ndarray, "pattern document"]]:
    random = np.random.default_rng(seed)
    for start in range(0, n_patterns, _PATTERNS_PER_CHUNK):
        size = (min(_PATTERNS_PER_CHUNK, n_patterns - start), documents)
        yield 1.0 - 2.0 * random.integers(0, 2, size, dtype=np.int8)
