"""Differences of ratios: against resampling written out, against the single ratio's interval, and how often they err."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_moe.statistics import ratio_bootstrap
from hooked_moe.statistics.ratio_differences import Ratios, ratio_differences


def made_up(random: np.random.Generator, documents: int, statistics: int, share: float = 0.5) -> Ratios:
    """Costs with heavy tails, and savings that are about a share of them."""
    cost = random.gamma(2, 1, (documents, statistics)) + 0.2
    return Ratios(share * cost + 0.3 * random.standard_t(5, (documents, statistics)), cost)


def by_loops(first: Ratios, second: Ratios, column: int, seed: int, n: int) -> tuple[float, float]:
    """The paired interval of one difference, each resample drawn out as documents and its error by the definition."""
    a, b, c, d = (x[:, column] for x in (first.numerator, first.denominator, second.numerator, second.denominator))
    documents = len(a)
    draws = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), n)

    def difference(chosen: np.ndarray) -> tuple[float, float]:
        one, other = a[chosen].sum() / b[chosen].sum(), c[chosen].sum() / d[chosen].sum()
        terms = (a[chosen] - one * b[chosen]) / b[chosen].sum() - (c[chosen] - other * d[chosen]) / d[chosen].sum()
        return one - other, float(np.sqrt((terms**2).sum() * documents / (documents - 1)))

    estimate, error = difference(np.arange(documents))
    t = []
    for counts in draws:
        value, own_error = difference(np.repeat(np.arange(documents), counts))
        t.append((value - estimate) / own_error)
    upper, lower = np.quantile(t, [0.975, 0.025])
    return estimate - upper * error, estimate - lower * error


def test_it_is_what_resampling_written_out_gives() -> None:
    random = np.random.default_rng(1)
    first, second = made_up(random, 13, 4), made_up(random, 13, 4, 0.3)
    found = ratio_differences(first, second, paired=True, n_resamples=300, seed=7)
    for column in range(4):
        low, high = by_loops(first, second, column, 7, 300)
        assert found.low[column] == pytest.approx(low, rel=1e-9)
        assert found.high[column] == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_against_a_ratio_without_variance_it_is_the_interval_of_the_other(paired: bool) -> None:
    random = np.random.default_rng(2)
    first = made_up(random, 20, 3)
    under = random.gamma(2, 1, (20, 3))
    found = ratio_differences(first, Ratios(0.25 * under, under), paired=paired, n_resamples=500, seed=3)
    alone = ratio_bootstrap(first.numerator, first.denominator, n_resamples=500, seed=3)
    np.testing.assert_allclose(found.low, alone.low - 0.25, rtol=1e-9)
    np.testing.assert_allclose(found.high, alone.high - 0.25, rtol=1e-9)


def test_a_run_and_itself_do_not_differ_and_have_no_interval() -> None:
    run = made_up(np.random.default_rng(3), 12, 2)
    found = ratio_differences(run, run, paired=True)
    np.testing.assert_array_equal(found.estimate, 0)
    assert np.isnan(found.low).all()


def test_pairing_narrows_what_documents_share_and_intervals_together_are_wider() -> None:
    random = np.random.default_rng(4)
    first = made_up(random, 30, 5)
    second = Ratios(first.numerator + 0.02 * random.normal(size=(30, 5)), first.denominator)
    paired, apart = (ratio_differences(first, second, paired=flag) for flag in (True, False))
    np.testing.assert_array_equal(paired.estimate, apart.estimate)
    assert ((paired.high - paired.low) < 0.3 * (apart.high - apart.low)).all()
    assert ((paired.high_together - paired.low_together) > (paired.high - paired.low)).all()


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_err_about_as_often_as_they_say(paired: bool) -> None:
    """True difference 0.2, 24 documents, 40 columns at once: the binomial error of 800 intervals at 5% is 0.8 points."""
    random = np.random.default_rng(5)
    missed = together = 0
    for seed in range(20):
        first, second = made_up(random, 24, 40, 0.5), made_up(random, 24, 40, 0.3)
        found = ratio_differences(first, second, paired=paired, n_resamples=500, seed=seed)
        missed += int(((found.low > 0.2) | (found.high < 0.2)).sum())
        together += int(((found.low_together > 0.2) | (found.high_together < 0.2)).any())
    assert 0.02 < missed / 800 < 0.08
    assert together <= 4  # of 20, at 5%: 5 or more would come in 0.3% of such tests


def test_what_has_no_interval_says_so() -> None:
    run = made_up(np.random.default_rng(6), 2, 1)
    assert np.isnan(ratio_differences(run, run, paired=True).low).all()
    zero = Ratios(np.ones((5, 1)), np.array([[1.0], [-1.0], [1.0], [-1.0], [0.5]]))
    assert np.isnan(ratio_differences(zero, made_up(np.random.default_rng(7), 5, 1), paired=True).low).all()
    with pytest.raises(ValueError, match="same documents"):
        ratio_differences(run, made_up(np.random.default_rng(8), 3, 1), paired=True)
