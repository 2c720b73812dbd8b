"""Paired inference against printed reference values, scipy, and slow loops."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from hooked_moe import statistics as stat

# Student's sleep data (1908): extra hours under two drugs, ten patients.
SLEEP_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])

# Benjamini and Hochberg (1995), section 3.2: fifteen p-values; Bonferroni and Holm both reject three at .05.
BH_1995 = np.array(
    [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
)


def test_the_sleep_data_give_the_t_and_p_of_the_textbooks():
    result = stat.paired_t(SLEEP_1, SLEEP_2)
    assert (result.n, result.sign) == (10, -1)
    assert result.t == pytest.approx(-4.0621277, abs=5e-8)
    assert result.p == pytest.approx(0.0028328902, abs=5e-11)
    assert result.mean_difference == pytest.approx(-1.58)


def test_wilcoxon_on_the_sleep_data_is_exact_and_drops_the_zero():
    result = stat.wilcoxon_signed_rank(SLEEP_1, SLEEP_2)
    assert (result.n, result.n_zero, result.sign) == (10, 1, -1)
    assert (result.rank_sum_positive, result.rank_sum_negative) == (0, 45)
    assert result.p == pytest.approx(0.00390625, abs=1e-12)  # 2 / 2^9


@given(st.integers(0, 10_000), st.integers(3, 400), st.floats(-0.5, 0.5))
@settings(max_examples=40, deadline=None)
def test_both_tests_agree_with_scipy(seed, n, shift):
    random = np.random.default_rng(seed)
    high, low = random.standard_t(3, n) + shift, random.standard_t(3, n)
    t, p = scipy.stats.ttest_rel(high, low)
    ours = stat.paired_t(high, low)
    assert (ours.t, ours.p) == (pytest.approx(t, rel=1e-10), pytest.approx(p, rel=1e-9))
    ranks = stat.wilcoxon_signed_rank(high, low)
    reference = scipy.stats.wilcoxon(high, low)
    assert ranks.p == pytest.approx(reference.pvalue, rel=1e-12)
    assert min(ranks.rank_sum_positive, ranks.rank_sum_negative) == pytest.approx(reference.statistic)


def test_wilcoxon_ranks_and_normal_p_follow_the_definition():
    random = np.random.default_rng(0)
    difference = np.round(random.normal(0.2, 1, 120), 1)  # rounded: ties and zeros
    kept = [x for x in difference if x != 0]
    by_size = sorted(abs(x) for x in kept)
    ranks = {size: np.mean([i + 1 for i, other in enumerate(by_size) if other == size]) for size in set(by_size)}
    positive = sum(ranks[abs(x)] for x in kept if x > 0)
    n = len(kept)
    ties = sum(by_size.count(size) ** 3 - by_size.count(size) for size in set(by_size))
    z = (positive - n * (n + 1) / 4) / np.sqrt(n * (n + 1) * (2 * n + 1) / 24 - ties / 48)
    result = stat.wilcoxon_signed_rank(difference, np.zeros(120))
    assert result.n_zero == 120 - n > 0
    assert result.rank_sum_positive == pytest.approx(positive)
    assert result.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-9)


def test_effect_size_is_mean_over_sd_with_the_ddof_asked_for():
    difference = SLEEP_1 - SLEEP_2
    sample, population = stat.cohens_dz(SLEEP_1, SLEEP_2), stat.cohens_dz(SLEEP_1, SLEEP_2, ddof=0)
    assert sample.d == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert population.d == pytest.approx(sample.d * np.sqrt(10 / 9))
    assert (sample.low, sample.high) == (population.low, population.high)


def test_the_interval_of_d_231_at_200_is_the_published_one():
    low, high = stat.dz_interval(0.231 * np.sqrt(200), 200)
    assert (round(low, 3), round(high, 3)) == (0.090, 0.371)


@pytest.mark.parametrize("n", [3, 5, 20, 200, 5000])
@pytest.mark.parametrize("t", [-30.0, -2.0, 0.0, 0.3, 5.0, 80.0])
def test_interval_ends_are_the_noncentralities_that_put_t_in_either_tail(n, t):
    low, high = stat.dz_interval(t, n, 0.9)
    assert low < high
    if t >= 0:  # scipy's noncentral cdf loses digits in the far tail of the other sign
        assert scipy.stats.nct.cdf(t, n - 1, low * np.sqrt(n)) == pytest.approx(0.95, abs=1e-5)
        assert scipy.stats.nct.cdf(t, n - 1, high * np.sqrt(n)) == pytest.approx(0.05, abs=1e-5)
    assert stat.dz_interval(-t, n, 0.9) == pytest.approx((-high, -low))


def test_the_interval_covers_at_its_level():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        size = stat.cohens_dz(random.normal(0.4, 1, 25), np.zeros(25))
        hits += size.low <= 0.4 <= size.high
    assert abs(hits / 1000 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 1000)


def test_clustered_interval_is_the_jackknife_done_by_hand():
    random = np.random.default_rng(2)
    cluster = np.repeat(np.arange(12), random.integers(3, 20, 12))
    values = random.normal(0.3, 1, len(cluster)) + random.normal(0, 0.8, 12)[cluster]
    left_out = []
    for one in range(12):
        rest = values[cluster != one]
        left_out.append(rest.mean() / rest.std(ddof=1))
    error = np.sqrt(11 / 12 * sum((d - np.mean(left_out)) ** 2 for d in left_out))
    reach = scipy.stats.t.ppf(0.975, 11) * error
    d = values.mean() / values.std(ddof=1)
    result = stat.clustered_dz(values, cluster * 7 + 3)  # any labels
    assert result.n == 12
    assert (result.d, result.low, result.high) == pytest.approx((d, d - reach, d + reach))


def test_clustered_interval_from_sums_is_that_from_pairs():
    random = np.random.default_rng(8)
    cluster = random.integers(0, 9, 400)
    values = random.standard_t(3, 400) + 0.2
    sums = [np.bincount(cluster, weights) for weights in (None, values, values**2)]
    pairs = stat.clustered_dz(values, cluster)
    assert vars(stat.clustered_dz_from_sums(*sums)) == pytest.approx(vars(pairs))
    assert pairs.interval(0.95) == pytest.approx((pairs.low, pairs.high))
    assert pairs.interval(0.9) == pytest.approx(tuple(vars(stat.clustered_dz(values, cluster, 0.9)).values())[1:3])


def test_clustered_interval_covers_where_the_naive_one_does_not():
    random = np.random.default_rng(3)
    clustered = naive = 0
    cluster = np.repeat(np.arange(40), 25)
    for _ in range(300):
        values = random.normal(0, 1, 1000) + random.normal(0, 0.5, 40)[cluster]
        wide, narrow = stat.clustered_dz(values, cluster), stat.cohens_dz(values, np.zeros(1000))
        clustered += wide.low <= 0 <= wide.high
        naive += narrow.low <= 0 <= narrow.high
    assert clustered / 300 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300)
    assert naive / 300 < 0.75


def test_bonferroni_and_holm_reject_three_of_benjamini_and_hochbergs_fifteen():
    assert (stat.bonferroni(BH_1995) <= 0.05).sum() == 3
    assert (stat.holm(BH_1995) <= 0.05).sum() == 3
    shuffled = np.random.default_rng(4).permutation(15)
    assert stat.holm(BH_1995[shuffled]) == pytest.approx(stat.holm(BH_1995)[shuffled])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_holm_is_the_step_down_procedure(p):
    """The adjusted p is the least level at which Holm's sequential procedure rejects."""
    adjusted = stat.holm(np.array(p))
    order = sorted(range(len(p)), key=lambda i: p[i])
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        assert adjusted[i] == pytest.approx(running)
    assert (adjusted <= stat.bonferroni(np.array(p)) + 1e-15).all()


def test_benjamini_and_hochbergs_procedure_rejects_four_of_their_fifteen():
    assert (stat.benjamini_hochberg(BH_1995) <= 0.05).sum() == 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_corrections_agree_with_statsmodels(p):
    values = np.array(p)
    for ours, theirs in ((stat.bonferroni, "bonferroni"), (stat.holm, "holm"), (stat.benjamini_hochberg, "fdr_bh")):
        np.testing.assert_allclose(ours(values), multipletests(values, method=theirs)[1], rtol=1e-12, atol=1e-300)


def test_refused_cells_stay_nan_and_count_in_the_family():
    p = np.array([0.01, np.nan, 0.02])
    np.testing.assert_allclose(stat.bonferroni(p), [0.03, np.nan, 0.06])
    np.testing.assert_allclose(stat.holm(p), [0.03, np.nan, 0.04])
    np.testing.assert_allclose(stat.benjamini_hochberg(p), [0.03, np.nan, 0.03])
    with pytest.raises(ValueError, match="a family of 2 tests cannot hold 3"):
        stat.holm(p, 2)


def _t(p: float, sign: int) -> stat.PairedT:
    return stat.PairedT(50, 0.1 * sign, 1.0, 2.0 * sign, p)


def _ranks(p: float, sign: int) -> stat.SignedRank:
    return stat.SignedRank(50, 0, 1000.0 + sign, 1000.0, p)


@pytest.mark.parametrize(
    ("p_t", "sign_t", "p_w", "sign_w", "expected"),
    [
        (0.001, 1, 0.001, 1, "positive"),
        (0.001, -1, 0.001, -1, "negative"),
        (0.001, 1, 0.001, -1, "tests_disagree"),
        (0.001, 1, 0.02, 1, "tests_disagree"),
        (0.02, 1, 0.001, 1, "tests_disagree"),
        (0.02, 1, 0.02, 1, "not_detected"),
        (0.0025, 1, 0.0025, 1, "positive"),  # the level itself passes
        # the two published cells that the rule was applied to unlike: Qwen's activation std, OLMoE's control in layer 15
        (0.0020, 1, 0.036, 1, "tests_disagree"),
        (0.0013, 1, 0.019, 1, "tests_disagree"),
    ],
)
def test_the_agreement_rule_wants_both_tests_and_one_sign(p_t, sign_t, p_w, sign_w, expected):
    assert stat.agreement(_t(p_t, sign_t), _ranks(p_w, sign_w), n_tests=20) == expected


@pytest.mark.parametrize("outcome", ["positive", "negative", "tests_disagree", "not_detected"])
def test_the_verdict_of_the_papers_protocol_is_its_agreement_rule(outcome):
    assert stat.verdict(outcome) == {"positive": "valid", "negative": "reversed"}.get(outcome, "undecided")


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.11, 0.5, 0.05, "helps"),
        (0.11, 0.5, 0.051, "undecided"),  # other scores would have done as well
        (0.11, 0.5, np.nan, "helps"),  # no permutation: the interval decides
        (0.09, 0.5, 0.001, "undecided"),
        (-0.5, -0.11, 0.01, "harms"),
        (-0.5, -0.11, 0.2, "undecided"),
        (-0.1, 0.1, 0.001, "negligible"),
        (0.02, 0.09, 0.001, "negligible"),  # surely above 0, and not worth following
        (-0.2, 0.05, 1.0, "undecided"),
        (np.nan, np.nan, 0.001, "undecided"),
    ],
)
def test_a_saving_is_judged_by_its_interval_and_its_permutation(low, high, p, expected):
    assert stat.saving_outcome(low, high, p) == expected


def test_a_permutation_is_two_sided_exact_and_counts_the_observed():
    permuted = np.arange(-49.0, 50.0)  # 99 of them
    found = stat.permutation_test(47.0, permuted)
    assert (found.p, found.n) == (2 * 4 / 100, 99)  # 47, 48, 49 and itself
    assert found.z == pytest.approx(47 / permuted.std(ddof=1))
    assert stat.permutation_test(-1000.0, permuted).p == 2 / 100
    assert stat.permutation_test(0.0, permuted).p == 1.0
    assert np.isnan(stat.permutation_test(1.0, np.zeros(9)).z)
    random = np.random.default_rng(0)
    reached = [stat.permutation_test(x[0], x[1:]).p <= 0.05 for x in random.normal(size=(4000, 80))]
    assert abs(np.mean(reached) - 0.05) < 0.012


def test_shrunk_means_are_nearer_the_truth_and_keep_those_never_seen_average():
    random = np.random.default_rng(1)
    error = {"raw": 0.0, "mean": 0.0}
    for _ in range(30):
        truth = random.normal(0.02, 0.01, 24)
        count = random.poisson(np.geomspace(0.2, 20, 24), (30, 24))
        count[:, 0] = 0
        total = truth * count + 0.08 * np.sqrt(count) * random.normal(size=count.shape)
        found = stat.shrunk_means(total, count)
        grand = total.sum() / count.sum()
        assert np.isnan(found.raw[0])
        assert found.mean[0] == pytest.approx(grand)
        seen = count.sum(axis=0) > 0
        np.testing.assert_allclose(found.raw[seen], total.sum(axis=0)[seen] / count.sum(axis=0)[seen])
        for name in error:
            error[name] += np.square(getattr(found, name) - truth)[seen].mean()
    assert error["mean"] < 0.75 * error["raw"]


def test_means_without_noise_are_not_shrunk_and_those_without_difference_are_ordered_by_evidence():
    count = np.tile([1, 2, 3], (4, 1))
    exact = stat.shrunk_means(count * np.array([0.1, 0.2, 0.3]), count)
    np.testing.assert_allclose(exact.mean, [0.1, 0.2, 0.3])
    random = np.random.default_rng(2)
    count = np.tile([4, 400, 40, 40], (50, 1))
    noise = stat.shrunk_means(np.sqrt(count) * random.normal(size=count.shape), count)
    if noise.between == 0:
        np.testing.assert_allclose(noise.mean, noise.mean.mean(), atol=1e-6)
    assert len(set(noise.mean)) == 4
    assert abs(noise.mean[0] - noise.mean.mean()) < abs(noise.raw[0] - noise.raw.mean())
    with pytest.raises(stat.DegenerateSample, match="2 documents"):
        stat.shrunk_means(np.ones((2, 3)), np.ones((2, 3)))


def test_power_and_minimal_detectable_effect_have_their_reference_values():
    assert stat.power_paired_t(0.2, 200, 0.0025) == pytest.approx(0.410075, abs=5e-7)
    assert stat.minimal_detectable_d(200, 0.0025) == pytest.approx(0.276, abs=5e-4)
    assert stat.power_paired_t(0.0, 200, 0.0025) == pytest.approx(0.0025)
    assert stat.power_paired_t(-0.2, 200, 0.0025) == stat.power_paired_t(0.2, 200, 0.0025)


@pytest.mark.parametrize("n", [3, 5, 12, 200, 20_000])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 24, 1e-6])
def test_power_rises_with_d_and_the_minimal_d_inverts_it(n, alpha):
    curve = [stat.power_paired_t(x / np.sqrt(n), n, alpha) for x in np.linspace(0, 150, 200)]
    assert np.isfinite(curve).all()
    assert (np.diff(curve) > -1e-9).all()
    assert stat.power_paired_t(stat.minimal_detectable_d(n, alpha), n, alpha) == pytest.approx(0.8, abs=1e-6)


def test_power_is_the_rejection_rate_of_the_test():
    random = np.random.default_rng(5)
    rejected = np.mean([stat.paired_t(random.normal(0.5, 1, 20), np.zeros(20)).p <= 0.01 for _ in range(2000)])
    power = stat.power_paired_t(0.5, 20, 0.01)
    assert abs(rejected - power) < 4 * np.sqrt(power * (1 - power) / 2000)


@pytest.mark.parametrize("n_tests", [1, 20, 24, 400, 10_000])
def test_the_minimum_of_documents_is_where_wilcoxon_can_first_pass(n_tests):
    least = stat.minimum_documents(n_tests)
    smallest_p = [2.0 / 2.0**n for n in (least - 1, least)]
    assert smallest_p[1] <= 0.05 / n_tests
    assert least == 10 or smallest_p[0] > 0.05 / n_tests
    assert stat.wilcoxon_signed_rank(np.arange(1.0, least + 1), np.zeros(least)).p == pytest.approx(smallest_p[1])


UNDEFINED = [
    (np.ones(2), np.zeros(2), stat.DegenerateSample, "2 pairs; paired inference needs at least 3"),
    (np.ones(9), np.zeros(9), stat.DegenerateSample, "all 9 differences equal 1"),
    (np.arange(9.0) / 3 + 0.1, np.arange(9.0) / 3, stat.DegenerateSample, "without variance"),  # equal up to rounding
    (np.array([1, np.nan, 3, np.nan]), np.arange(4.0), ValueError, "2 of 4 pairs hold NaN or infinity"),
    (np.array([1, np.inf, 3]), np.arange(3.0), ValueError, "1 of 3 pairs"),
]


@pytest.mark.parametrize("function", [stat.paired_t, stat.wilcoxon_signed_rank, stat.cohens_dz])
@pytest.mark.parametrize(("high", "low", "kind", "message"), UNDEFINED)
def test_undefined_statistics_are_refused_by_name(function, high, low, kind, message):
    with pytest.raises(kind, match=message):
        function(high, low)


@pytest.mark.parametrize("function", [stat.paired_t, stat.wilcoxon_signed_rank, stat.cohens_dz])
@pytest.mark.usefixtures("unchecked")
def test_unequal_lengths_are_refused(function):
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(5,\)"):
        function(np.arange(4.0), np.arange(5.0))


def test_clustered_interval_refuses_too_few_clusters_and_clusters_that_hold_all_variance():
    values = np.arange(12.0)
    with pytest.raises(stat.DegenerateSample, match="2 clusters"):
        stat.clustered_dz(values, np.repeat([0, 1], 6))
    spike = np.zeros(12)
    spike[:2] = (1, 2)
    with pytest.raises(stat.DegenerateSample, match="without variance"):
        stat.clustered_dz(spike, np.repeat([0, 1, 2], (2, 5, 5)))
