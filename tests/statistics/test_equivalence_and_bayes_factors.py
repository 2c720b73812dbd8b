"""TOST and JZS Bayes factors against printed values, pingouin, and the integrals they stand for."""

import numpy as np
import pingouin
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_moe import statistics as stat

MEDIUM = 0.707  # pingouin's default scale, to which the printed values belong unless they say otherwise


def test_tost_of_the_reference_pairs():
    result = stat.tost_paired(np.array([4, 7, 8, 6, 3, 2]), np.array([6, 8, 7, 10, 11, 9]), -0.5, 0.5)
    assert result.p == pytest.approx(0.954854, abs=5e-7)
    assert not result.equivalent


@given(st.integers(0, 10_000), st.integers(3, 200), st.floats(0.01, 2))
@settings(max_examples=30, deadline=None)
def test_tost_agrees_with_pingouin_and_with_its_own_interval(seed, n, bound):
    random = np.random.default_rng(seed)
    high, low = random.normal(0.1, 1, n), random.normal(0, 1, n)
    result = stat.tost_paired(high, low, -bound, bound)
    assert result.p == pytest.approx(pingouin.tost(high, low, bound=bound, paired=True)["pval"].iloc[0], rel=1e-9)
    assert result.equivalent == (-bound < result.low and result.high < bound)


def test_clustered_equivalence_is_a_t_test_at_either_bound():
    effect = stat.ClusteredEffect(d=0.03, low=np.nan, high=np.nan, n=20, se=0.04)
    result = stat.equivalence(effect, 0.1)
    assert result.p == pytest.approx(scipy.stats.t.sf((0.1 - 0.03) / 0.04, 19))
    assert (result.low, result.high) == pytest.approx(effect.interval(0.9))
    mirrored = stat.equivalence(stat.ClusteredEffect(-0.03, np.nan, np.nan, 20, 0.04), 0.1)
    assert mirrored.p == pytest.approx(result.p)


@pytest.mark.parametrize("t", [-2.5, -0.4, 0.0, 1.1])
@pytest.mark.parametrize("n", [50, 400, 3000])
def test_exact_equivalence_rejects_where_the_exact_interval_lies_inside(t, n):
    inside = stat.dz_interval(t, n, 0.9)
    reach = max(abs(inside[0]), abs(inside[1]))
    assert stat.equivalence_dz(t, n, reach * 1.001).equivalent
    assert not stat.equivalence_dz(t, n, reach * 0.999).equivalent
    assert (stat.equivalence_dz(t, n).low, stat.equivalence_dz(t, n).high) == inside


def test_the_exact_equivalence_test_has_its_level_at_the_bound():
    random = np.random.default_rng(0)
    rejected = 0
    for _ in range(2000):
        sample = stat.paired_t(random.normal(0.1, 1, 1500), np.zeros(1500))
        rejected += stat.equivalence_dz(sample.t, 1500).equivalent
    assert abs(rejected / 2000 - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_equivalence_refuses_bounds_that_enclose_nothing():
    with pytest.raises(ValueError, match=r"above 0, got -0\.1"):
        stat.equivalence_dz(0.0, 10, -0.1)
    with pytest.raises(ValueError, match="lower < upper"):
        stat.tost_paired(np.arange(4.0), np.arange(4.0)[::-1], 0.5, -0.5)


@pytest.mark.parametrize(
    ("t", "n", "scale", "expected", "digits"),
    [
        (3.267, 200, MEDIUM, 13.31594, 5e-6),
        (0.0, 200, MEDIUM, 0.0790251, 5e-8),
        (2.24, 80, MEDIUM, 1.298637, 1e-6),
        (2.03, 100, 1.0, 0.583934, 5e-7),
        (-4.0621277, 10, np.sqrt(0.5), 17.25888, 5e-6),  # the sleep data
    ],
)
def test_bayes_factors_have_their_reference_values(t, n, scale, expected, digits):
    assert stat.jzs_bf10(t, n, scale) == pytest.approx(expected, abs=digits)


@given(st.floats(-12, 12), st.integers(2, 500), st.floats(0.2, 2))
@settings(max_examples=60, deadline=None)
def test_bayes_factors_agree_with_pingouin(t, n, scale):
    assert stat.jzs_bf10(t, n, scale) == pytest.approx(pingouin.bayesfactor_ttest(t, n, paired=True, r=scale), rel=2e-5)


@pytest.mark.parametrize(("t", "n"), [(3.267, 200), (0.7, 48), (-1.2, 12), (0.0, 30)])
def test_the_directional_bayes_factor_averages_the_likelihood_over_a_half_cauchy(t, n):
    def joint(effect: float) -> float:
        return scipy.stats.nct.pdf(t, n - 1, effect * np.sqrt(n)) * 2 * scipy.stats.cauchy.pdf(effect, 0, MEDIUM)

    likelihood = scipy.integrate.quad(joint, 0, 3, epsabs=0, epsrel=1e-9, points=[0.1, 0.5])[0]
    assert stat.jzs_directional(t, n, MEDIUM) == pytest.approx(likelihood / scipy.stats.t.pdf(t, n - 1), rel=1e-6)


@given(st.floats(-20, 20), st.integers(2, 5000))
@settings(max_examples=60, deadline=None)
def test_both_directions_together_are_the_undirected_bayes_factor(t, n):
    both = stat.jzs_directional(t, n) + stat.jzs_directional(-t, n)
    assert both / 2 == pytest.approx(stat.jzs_bf10(t, n), rel=1e-9)


def test_bayes_factors_of_overwhelming_evidence_neither_overflow_nor_vanish():
    assert 1e28 < stat.jzs_bf10(30.0, 48) < 1e29
    assert stat.jzs_bf10(200.0, 100_000) == np.inf
    assert 0 < stat.jzs_directional(-30.0, 48) < 0.1
    assert 0 < stat.jzs_bf10(0.0, 10**7) < 1e-3


def test_bayes_factors_refuse_what_is_no_t():
    with pytest.raises(ValueError, match="finite t"):
        stat.jzs_bf10(float("nan"), 10)
    with pytest.raises(ValueError, match="n >= 2"):
        stat.jzs_directional(1.0, 1)
