"""The bootstrap and the sign flip against slow loops over resamples, scipy and statsmodels."""

import itertools

import numpy as np
import pytest
import scipy.stats
import statsmodels.api
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_moe import statistics as stat
from tests.statistics.test_statistics import SLEEP_1, SLEEP_2


def _t(values):
    return np.mean(values) / (np.std(values, ddof=1) / np.sqrt(len(values)))


def test_the_sleep_data_have_the_exact_sign_flip_p():
    result = stat.sign_flip_max_t((SLEEP_1 - SLEEP_2)[:, None])
    assert (result.exact, result.n_patterns) == (True, 1024)
    assert result.t == pytest.approx([-4.0621277], abs=5e-8)
    assert result.p == pytest.approx([0.00390625])
    assert result.p_max == pytest.approx(result.p)


def test_the_exact_sign_flip_agrees_with_scipys_permutation_test():
    difference = np.random.default_rng(0).normal(0.4, 1, 9)
    theirs = scipy.stats.permutation_test(
        (difference, np.zeros(9)), lambda a, b: abs(np.mean(a - b)), permutation_type="samples", alternative="greater"
    )
    assert stat.sign_flip_max_t(difference[:, None]).p == pytest.approx([theirs.pvalue])


@given(st.integers(0, 10_000), st.integers(3, 7), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_max_t_is_the_loop_over_all_patterns(seed, documents, tests):
    table = np.random.default_rng(seed).standard_t(3, (documents, tests))
    observed = np.array([abs(_t(column)) for column in table.T])
    flipped = []
    for signs in itertools.product((1, -1), repeat=documents):
        flipped.append([abs(_t(np.array(signs) * column)) for column in table.T])
    beyond = np.array(flipped)[:, None, :].max(axis=2) >= observed * (1 - 1e-9)
    result = stat.sign_flip_max_t(table)
    assert result.p_max == pytest.approx(beyond.mean(axis=0))
    assert (result.p_max >= result.p - 1e-12).all()


def test_random_patterns_approach_the_exact_p():
    table = np.random.default_rng(1).normal(0.3, 1, (12, 3))
    exact, sampled = stat.sign_flip_max_t(table), stat.sign_flip_max_t(table, n_patterns=4000, seed=7)
    assert exact.exact
    assert not sampled.exact
    for ours, reference in ((sampled.p, exact.p), (sampled.p_max, exact.p_max)):
        assert np.abs(ours - reference).max() < 4 * np.sqrt(0.25 / 4000)
    again = stat.sign_flip_max_t(table, n_patterns=4000, seed=7)
    np.testing.assert_array_equal(sampled.p_max, again.p_max)


def test_a_document_without_a_pair_is_left_out_of_that_test_alone():
    table = np.random.default_rng(2).normal(0.5, 1, (9, 2))
    table[[1, 4], 0] = np.nan
    result = stat.sign_flip_max_t(table)
    alone = stat.sign_flip_max_t(table[~np.isnan(table[:, 0]), :1])
    assert (result.t[0], result.p[0]) == pytest.approx((alone.t[0], alone.p[0]))


def test_sign_flips_refuse_tests_without_documents_or_variance():
    table = np.ones((5, 2))
    with pytest.raises(stat.DegenerateSample, match="same difference in all documents"):
        stat.sign_flip_max_t(table)
    table[:3, 1] = np.nan
    with pytest.raises(stat.DegenerateSample, match="test 1 has 2 documents"):
        stat.sign_flip_max_t(table)
    with pytest.raises(ValueError, match="1 of 10 values of difference"):
        stat.sign_flip_max_t(np.where(np.arange(10).reshape(5, 2) == 3, np.inf, 1.0))


def test_clustered_error_of_a_mean_is_that_of_statsmodels():
    random = np.random.default_rng(3)
    document = random.integers(0, 15, 300)
    values = random.normal(size=300) + document % 4
    count, total = np.bincount(document), np.bincount(document, values)
    result = stat.cluster_bootstrap(total[:, None], count, n_resamples=50)
    model = statsmodels.api.OLS(values, np.ones(300)).fit(
        cov_type="cluster", cov_kwds={"groups": document, "df_correction": False, "use_correction": False}
    )
    assert result.estimate[0] == pytest.approx(values.mean())
    assert result.se[0] == pytest.approx(float(model.bse[0]) * np.sqrt(15 / 14))


def test_the_bootstrap_is_the_studentised_one_done_by_hand():
    random = np.random.default_rng(4)
    count = random.integers(1, 9, 10)
    total = random.gamma(1, 1, (10, 2)) * count[:, None]
    drawn = np.random.default_rng(5).multinomial(10, np.full(10, 0.1), size=300)
    result = stat.cluster_bootstrap(total, count, n_resamples=300, confidence=0.9, seed=5)

    def mean_and_error(chosen, column):
        sums, sizes = total[chosen, column], count[chosen]
        mean = sums.sum() / sizes.sum()
        return mean, np.sqrt(10 / 9 * np.sum((sums - mean * sizes) ** 2)) / sizes.sum()

    for column in range(2):
        mean, error = mean_and_error(np.arange(10), column)
        studentised = []
        for times in drawn:
            one, spread = mean_and_error(np.repeat(np.arange(10), times), column)
            studentised.append((one - mean) / spread)
        upper, lower = np.quantile(studentised, [0.95, 0.05])
        expected = (mean, error, mean - upper * error, mean - lower * error)
        ours = tuple(getattr(result, name)[column] for name in ("estimate", "se", "low", "high"))
        assert ours == pytest.approx(expected)


def test_without_counts_the_documents_weigh_alike():
    values = np.random.default_rng(6).normal(size=(20, 1))
    result = stat.cluster_bootstrap(values)
    assert (result.estimate[0], result.se[0]) == pytest.approx((values.mean(), values.std(ddof=1) / np.sqrt(20)))
    assert result.low[0] < result.estimate[0] < result.high[0]


def test_the_bootstrap_refuses_what_it_cannot_resample():
    with pytest.raises(stat.DegenerateSample, match="2 documents"):
        stat.cluster_bootstrap(np.ones((2, 1)))
    with pytest.raises(stat.DegenerateSample, match="statistic 1 is the same in all 5"):
        stat.cluster_bootstrap(np.stack([np.arange(5.0), np.full(5, 0.3)], axis=1))
    with pytest.raises(ValueError, match="1 of 5 values of total are NaN"):
        stat.cluster_bootstrap(np.array([[1.0], [2], [np.nan], [3], [4]]))


@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_within_position_spearman_agrees_with_scipy(seed, slots, tied):
    random = np.random.default_rng(seed)
    score, delta = random.normal(size=(2, 6, slots))
    if tied:
        score, delta = np.round(score), np.round(delta)
    ours = stat.within_position_spearman(score, delta)
    for row in range(6):
        np.testing.assert_allclose(stat.within_position_ranks(score)[row] + (slots + 1) / 2, scipy.stats.rankdata(score[row]))
        if np.ptp(score[row]) == 0 or np.ptp(delta[row]) == 0:
            assert np.isnan(ours[row])
        else:
            assert ours[row] == pytest.approx(scipy.stats.spearmanr(score[row], delta[row]).statistic)


def test_spearman_of_a_position_with_an_undefined_score_is_undefined():
    score = np.array([[1.0, np.nan, 3], [1, 2, 3]])
    np.testing.assert_allclose(stat.within_position_spearman(score, np.array([[1.0, 2, 3], [3, 2, 1]])), [np.nan, -1])


def test_a_ratio_with_one_denominator_has_the_interval_of_the_bootstrap_of_means():
    random = np.random.default_rng(4)
    count = random.integers(1, 9, 25).astype(float)
    total = count[:, None] * random.standard_t(4, (25, 3)) + 0.3
    means = stat.cluster_bootstrap(total, count)
    ratios = stat.ratio_bootstrap(total, count[:, None])
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(ratios, name), getattr(means, name), rtol=1e-6, atol=1e-9)


def test_ratios_of_any_shape_are_those_of_each_alone_and_have_no_interval_where_the_denominator_may_be_nothing():
    random = np.random.default_rng(5)
    over, under = random.normal(1, 1, (20, 2, 3)), random.normal(2, 1, (20, 2, 3))
    under[:, 1, 2] -= under[:, 1, 2].mean() - 0.01  # its sum is above 0 by luck
    over[:, 0, 1] = 0.5 * under[:, 0, 1]  # the same in all documents
    found = stat.ratio_bootstrap(over, under)
    np.testing.assert_allclose(found.estimate, over.sum(axis=0) / under.sum(axis=0))
    assert np.isnan(found.low[[0, 1], [1, 2]]).all()
    for at in ((0, 0), (0, 2), (1, 0), (1, 1)):
        alone = stat.ratio_bootstrap(over[(slice(None), *at)], under[(slice(None), *at)])
        np.testing.assert_allclose((found.low[at], found.high[at]), (alone.low, alone.high), rtol=1e-9)
        assert found.low[at] < found.estimate[at] < found.high[at]
    few = stat.ratio_bootstrap(over[:2], under[:2])
    assert np.isfinite(few.estimate).all()
    assert np.isnan(few.low).all()


def test_intervals_of_a_share_hold_it_as_often_as_they_should_though_tails_are_skewed():
    random = np.random.default_rng(6)
    cost = random.lognormal(0, 0.4, (1000, 24, 1)) * random.lognormal(0, 0.7, (1000, 24, 2))
    # of each run: the first of two costs as a share of both; half, on average of numerator and denominator
    found = stat.ratio_bootstrap(np.moveaxis(cost[..., 0], 0, 1), np.moveaxis(cost.sum(axis=2), 0, 1), n_resamples=800)
    missed = (found.low > 0.5) | (found.high < 0.5)
    assert abs(missed.mean() - 0.05) < 0.025
