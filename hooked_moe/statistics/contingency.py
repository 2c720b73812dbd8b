"""How two choices made at the same tokens go together: lift and phi of every pair, with intervals over documents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS

_CELLS_PER_CHUNK = 4096


@dataclass(frozen=True)
class Association:
    """Of every pair (i, j). Intervals are NaN with fewer than three documents, and where a resample lacks either choice."""

    lift: Float[np.ndarray, "i j"]
    """P(i and j) / (P(i) P(j)): 1 where the two are independent. NaN where either never occurs."""
    lift_low: Float[np.ndarray, "i j"]
    lift_high: Float[np.ndarray, "i j"]
    phi: Float[np.ndarray, "i j"]
    """Pearson correlation of the two, as 0 and 1 at each token. NaN where either never or always occurs."""
    phi_low: Float[np.ndarray, "i j"]
    phi_high: Float[np.ndarray, "i j"]


def association(
    both: Num[np.ndarray, "document i j"],
    first: Num[np.ndarray, "document i"],
    second: Num[np.ndarray, "document j"],
    total: Num[np.ndarray, " document"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Association:
    """Lift and phi from counts: of tokens where both occur, where either does, and of all tokens, by document.

    Intervals are percentiles over resamples of whole documents, the same resamples for all pairs: tokens of a document are alike.
    `n_resamples=0` leaves them out.
    """
    documents, rows, columns = both.shape
    ones, every = np.ones((1, documents)), np.arange(rows * columns)
    lift, phi = (
        _of_cells(statistic, ones, both, first, second, total, every).reshape(rows, columns) for statistic in (_lift, _phi)
    )
    ends = np.full((4, rows * columns), np.nan)
    if documents >= MINIMUM_PAIRS and n_resamples:
        random = np.random.default_rng(seed)
        drawn = random.multinomial(documents, np.full(documents, 1 / documents), size=n_resamples).astype(np.float64)
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        for place, statistic in ((0, _lift), (2, _phi)):
            for start in range(0, rows * columns, _CELLS_PER_CHUNK):
                cells = np.arange(start, min(start + _CELLS_PER_CHUNK, rows * columns))
                ends[place : place + 2, cells] = _quantiles(_of_cells(statistic, drawn, both, first, second, total, cells), tails)
    low, high, phi_low, phi_high = ends.reshape(4, rows, columns)
    return Association(lift, low, high, phi, phi_low, phi_high)


_Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _lift(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return both / (first * second)


def _phi(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (both - first * second) / np.sqrt(first * (1 - first) * second * (1 - second))


def _of_cells(
    statistic: _Statistic,
    drawn: Float[np.ndarray, "resample document"],
    both: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    total: np.ndarray,
    cells: np.ndarray,
) -> Float[np.ndarray, "cell resample"]:
    i, j = np.divmod(cells, both.shape[2])
    times = drawn.T
    n = total @ times
    together = both.reshape(len(both), -1)[:, cells].T @ times / n
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistic(together, (first.T @ times / n)[i], (second.T @ times / n)[j])


def _quantiles(values: Float[np.ndarray, "event resample"], tails: tuple[float, float]) -> Float[np.ndarray, "end event"]:
    """`np.quantile` along the rows, several times as fast; NaN where any value is NaN or infinite."""
    ordered = np.sort(values, axis=-1)
    ordered[~np.isfinite(ordered[:, [0, -1]]).all(axis=-1)] = np.nan
    places = np.array(tails) * (values.shape[-1] - 1)
    below = places.astype(int)
    low, high = ordered[:, below], ordered[:, np.minimum(below + 1, values.shape[-1] - 1)]
    return (low + (high - low) * (places - below)).T


@dataclass(frozen=True)
class SharesCompared:
    """Any number of events. Intervals are NaN with fewer than three units, and where a resample leaves nothing to divide by."""

    estimate: Float[np.ndarray, " event"]
    low: Float[np.ndarray, " event"]
    high: Float[np.ndarray, " event"]


def compare_shares(
    first: Num[np.ndarray, "unit event"],
    first_total: Num[np.ndarray, " unit"],
    second: Num[np.ndarray, "unit event"],
    second_total: Num[np.ndarray, " unit"],
    *,
    ratio: bool = False,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> SharesCompared:
    """sum(first) / sum(first_total) less the same of the second, or divided by it: a risk difference or ratio, of paired units.

    Intervals are percentiles over resamples of whole units, both halves of a unit together.
    """
    units = len(first)

    def of(drawn: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (drawn @ a / (drawn @ n)[:, None] for a, n in ((first, first_total), (second, second_total)))
            return one / other if ratio else one - other

    estimate = of(np.ones((1, units)))[0]
    ends = np.full((2, len(estimate)), np.nan)
    if units >= MINIMUM_PAIRS:
        random = np.random.default_rng(seed)
        drawn = random.multinomial(units, np.full(units, 1 / units), size=n_resamples).astype(np.float64)
        ends = _quantiles(of(drawn).T, ((1 - confidence) / 2, (1 + confidence) / 2))
    return SharesCompared(estimate, *ends)
