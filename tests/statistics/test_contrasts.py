"""Effects of factors, against least squares of statsmodels, simulation and planted effects."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import statsmodels.api

from hooked_moe.analysis.factors import DESIGN
from hooked_moe.statistics import DegenerateSample
from hooked_moe.statistics.contrasts import all_contrasts, detectable_t, effect_outcome, factor_effects, lenth
from hooked_moe.statistics.factorial import informative_order

LEVELS = DESIGN.levels()
TRUE = np.array([1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0])


def responses(n_seeds: int, sd: float = 0.2, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    shift = random.normal(0, 1, n_seeds)  # a seed's own mean is no effect
    return (LEVELS @ TRUE / 2)[:, None] + shift + random.normal(0, sd, (16, n_seeds))


def test_an_effect_is_high_mean_less_low_mean() -> None:
    y = responses(1)
    effects = factor_effects(LEVELS, y)
    expected = [y[LEVELS[:, f] > 0].mean() - y[LEVELS[:, f] < 0].mean() for f in range(7)]
    np.testing.assert_allclose(effects.estimate, expected)
    assert effects.method == "lenth"
    assert (effects.n_runs, effects.n_seeds) == (16, 1)


@pytest.mark.parametrize("absent", [[(3, 0)], [(3, 0), (5, 1), (12, 0)]])
def test_incomplete_runs_are_fitted_by_least_squares(absent: list[tuple[int, int]]) -> None:
    y = responses(2)
    for place in absent:
        y[place] = np.nan
    effects = factor_effects(LEVELS, y)
    run, seed = np.nonzero(~np.isnan(y))
    X = np.column_stack([np.ones(len(run)), LEVELS[run], seed == 1])
    fit = statsmodels.api.OLS(y[run, seed], X).fit()
    assert effects.method == "residual"
    np.testing.assert_allclose(effects.estimate, 2 * fit.params[1:8])
    assert effects.se == pytest.approx(2 * fit.bse[1:8].max())
    assert effects.df == fit.df_resid


def test_the_error_between_seeds_is_that_of_a_two_way_analysis() -> None:
    y = responses(3)
    effects = factor_effects(LEVELS, y)
    run, seed = (index.ravel() for index in np.indices(y.shape))
    X = np.column_stack([run[:, None] == np.arange(16), seed[:, None] == np.arange(1, 3)]).astype(float)
    fit = statsmodels.api.OLS(y.ravel(), X).fit()
    assert effects.method == "seeds"
    assert effects.df == fit.df_resid == 30
    assert effects.se == pytest.approx(np.sqrt(fit.scale) * 2 / np.sqrt(48))
    assert effects.p_holm[0] < 1e-6
    assert effects.low[0] < 1 < effects.high[0]


def test_three_seeds_hold_their_level_and_their_coverage() -> None:
    covered = found = 0
    for seed in range(150):
        effects = factor_effects(LEVELS, responses(3, sd=0.5, seed=seed))
        covered += int(((effects.low <= TRUE) & (effects.high >= TRUE)).sum())
        found += int((effects.p_holm[2:] <= 0.05).any())
    assert covered / 1050 == pytest.approx(0.95, abs=0.02)
    assert found / 150 <= 0.08


def test_lenths_error_is_that_of_the_noise_where_few_effects_are_active() -> None:
    errors = [factor_effects(LEVELS, responses(1, sd=0.3, seed=seed)).se for seed in range(150)]
    assert np.median(errors) == pytest.approx(0.5 * 0.3, rel=0.2)
    null = [factor_effects(LEVELS, responses(1, seed=seed) - (LEVELS @ TRUE / 2)[:, None]).p_holm.min() for seed in range(150)]
    assert np.mean(np.array(null) <= 0.05) <= 0.1


def test_lenths_statistic_is_that_of_his_paper() -> None:
    contrasts = np.array([0.1, -0.2, 0.3, 0.05, -0.15, 0.25, 5.0])
    pse, df = lenth(contrasts)
    assert pse == pytest.approx(1.5 * np.median([0.1, 0.2, 0.3, 0.05, 0.15, 0.25]))
    assert df == pytest.approx(7 / 3)


def test_all_contrasts_of_a_design_are_orthogonal() -> None:
    contrasts = all_contrasts(LEVELS)
    assert contrasts.shape == (16, 15)
    np.testing.assert_array_equal(contrasts.T @ contrasts, 16 * np.eye(15))
    np.testing.assert_array_equal(contrasts[:, :7], LEVELS)


def test_half_of_the_runs_give_all_effects_and_fewer_are_refused() -> None:
    order = informative_order(LEVELS)
    y = responses(1)
    half = factor_effects(LEVELS[order[:8]], y[order[:8]])
    assert half.method == "lenth"
    assert half.df == pytest.approx(7 / 3)
    with pytest.raises(DegenerateSample, match="6 runs cannot tell 7 factors apart"):
        factor_effects(LEVELS[order[:6]], y[order[:6]])
    with pytest.raises(DegenerateSample, match="9 runs leave 1 degrees of freedom"):
        factor_effects(LEVELS[order[:9]], y[order[:9]])


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    random = np.random.default_rng(0)
    t = detectable_t(30.0, 0.05 / 7) + random.normal(size=20000)
    t = t / np.sqrt(random.chisquare(30, 20000) / 30)

    assert np.mean(np.abs(t) > scipy.stats.t.isf(0.05 / 14, 30)) == pytest.approx(0.8, abs=0.01)


def test_outcomes() -> None:
    assert effect_outcome(0.1, 0.5, 0.01, bound=0.1) == "effect"
    assert effect_outcome(-0.05, 0.08, 0.5, bound=0.1) == "negligible"
    assert effect_outcome(-0.05, 0.2, 0.5, bound=0.1) == "undecided"
