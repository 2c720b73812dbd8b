"""The static ceiling against ordinary least squares with dummies, and on data whose share is planted."""

import numpy as np
import pytest

from hooked_moe import statistics as stat

EXPERTS, SLOTS = 8, 3


def _table(documents=30, tokens=40, spread=0.5, seed=0):
    """document [P], expert [P, K], delta [P, K], and the expert effects planted."""
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), tokens)
    liking = np.linspace(1, -1, EXPERTS) + random.gumbel(size=(len(document), EXPERTS))
    expert = np.argsort(-liking, axis=1)[:, :SLOTS]
    effect = spread * random.normal(size=EXPERTS)
    hardness = 3 * random.normal(size=(len(document), 1))
    return document, expert, effect[expert] + hardness + random.normal(size=expert.shape), effect


def _accumulated(document, expert, delta, n_folds=10):
    ceiling = stat.StaticCeiling(EXPERTS, n_folds)
    ceiling.add(document, expert, delta)
    return ceiling


def _centred(values):
    return values - values.mean(axis=1, keepdims=True)


def _planted_share(expert, effect):
    between = np.mean(_centred(effect[expert]) ** 2)
    return between / (between + (SLOTS - 1) / SLOTS)  # unit noise, less the mean over the slots


def test_on_one_fold_per_document_it_is_the_jackknifed_least_squares_done_by_hand():
    document, expert, delta, _ = _table(documents=6, tokens=30)
    result = _accumulated(document, expert, delta, n_folds=6).ceiling()

    def by_hand(kept):
        indicator = np.eye(EXPERTS)[expert[kept]]
        x = indicator - indicator.mean(axis=1, keepdims=True)
        c = _centred(delta[kept])
        # least squares over single rows explains S' G^+ S; then without each document's own products
        flat, target = x.reshape(-1, EXPERTS), c.ravel()
        inverse = np.linalg.pinv(flat.T @ flat)
        explained = target @ flat @ np.linalg.lstsq(flat, target)[0]
        per_document = [np.einsum("pke,pk->e", x[document[kept] == d], c[document[kept] == d]) for d in np.unique(document[kept])]
        within = sum(s @ inverse @ s for s in per_document)
        return (explained - within) / (1 - 1 / len(per_document)) / (target @ target)

    everything = np.ones(len(document), bool)
    left_out = np.array([by_hand(document != d) for d in range(6)])
    assert result.share == pytest.approx(by_hand(everything))
    assert result.se == pytest.approx(np.sqrt(5 / 6 * np.sum((left_out - left_out.mean()) ** 2)))


def test_a_score_explains_what_its_regression_explains_but_for_the_noise():
    document, expert, delta, effect = _table(documents=200)
    result = _accumulated(document, expert, delta).share(effect)
    x, c = _centred(effect[expert]).ravel(), _centred(delta).ravel()
    assert result.share == pytest.approx((x @ c) ** 2 / (x @ x) / (c @ c), abs=5e-4)
    assert result.slope == pytest.approx(x @ c / (x @ x))


def test_the_ceiling_is_unbiased_whether_experts_differ_or_not():
    for spread in (0.0, 0.3):
        error, estimates = [], []
        for seed in range(150):
            document, expert, delta, effect = _table(20, 15, spread, seed)
            result = _accumulated(document, expert, delta).ceiling()
            estimates.append(result.share)
            error.append(result.share - _planted_share(expert, effect))
        assert abs(np.mean(error)) < 4 * np.std(error) / np.sqrt(150)
        assert np.std(error) < 0.05  # and it says something
        naive = (EXPERTS - 1) / (20 * 15 * (SLOTS - 1))  # what least squares explains of pure noise
        assert np.std(error) / np.sqrt(150) < naive / 4  # so the bias of the naive estimate would have been seen


def test_the_true_effects_reach_the_ceiling_and_the_oracle_comes_close():
    document, expert, delta, effect = _table(documents=100)
    accumulated = _accumulated(document, expert, delta)
    ceiling, true, oracle = accumulated.ceiling(), accumulated.share(effect), accumulated.oracle()
    assert ceiling.share == pytest.approx(_planted_share(expert, effect), abs=3 * ceiling.se)
    assert true.of_ceiling == pytest.approx(1, abs=0.03)
    assert true.slope == pytest.approx(1, abs=0.05)
    assert 0.95 < oracle.of_ceiling < 1.02
    assert 0.9 < oracle.slope < 1.05
    reversed_score = accumulated.share(-effect)
    assert (reversed_score.share, reversed_score.slope) == pytest.approx((true.share, -true.slope))
    blind = accumulated.share(np.random.default_rng(3).normal(size=EXPERTS))
    assert -0.05 < blind.of_ceiling < 0.9


def test_a_ranking_cannot_beat_the_ceiling_though_experts_keep_company():
    """Two experts that always meet: the mean of the centred losses alone would put the bound at half of what is so."""
    random = np.random.default_rng(1)
    document = np.repeat(np.arange(20), 50)
    expert = np.where(random.random((1000, 1)) < 0.5, [0, 1], [2, 3])
    delta = np.array([1.0, -1, 2, -2])[expert] + 0.1 * random.normal(size=(1000, 2))
    accumulated = stat.StaticCeiling(4)
    accumulated.add(document, expert, delta)
    assert accumulated.ceiling().share == pytest.approx(0.998, abs=0.002)
    assert accumulated.share(np.array([1.0, -1, 2, -2])).of_ceiling == pytest.approx(1, abs=1e-3)


def test_oracle_scores_come_from_other_documents():
    document, expert, delta, effect = _table(documents=50)
    accumulated = _accumulated(document, expert, delta, n_folds=5)
    scores = accumulated.oracle_scores()
    x = np.eye(EXPERTS)[expert] - np.eye(EXPERTS)[expert].mean(axis=1, keepdims=True)
    kept = accumulated.fold(document) != 2
    by_hand = np.linalg.lstsq(x[kept].reshape(-1, EXPERTS), _centred(delta)[kept].ravel())[0]
    np.testing.assert_allclose(scores[2], by_hand, atol=1e-10)
    changed = np.where(kept[:, None], delta, 100 * delta)
    np.testing.assert_allclose(_accumulated(document, expert, changed, 5).oracle_scores()[2], scores[2], rtol=1e-9)
    assert np.abs(scores - (effect - effect.mean())).max() < 0.4


def test_chunks_and_one_pass_give_the_same():
    document, expert, delta, effect = _table()
    chunked = stat.StaticCeiling(EXPERTS)
    for rows in np.array_split(np.arange(len(document)), 7):
        chunked.add(document[rows], expert[rows], delta[rows].astype(np.float32).astype(np.float64))
    whole = _accumulated(document, expert, delta.astype(np.float32))
    for one, other in ((chunked.ceiling(), whole.ceiling()), (chunked.oracle(), whole.oracle())):
        assert vars(one) == pytest.approx(vars(other), rel=1e-6)
    assert vars(chunked.share(effect)) == pytest.approx(vars(whole.share(effect)), rel=1e-6)


def test_experts_without_a_score_are_counted_and_those_never_active_need_none():
    document, expert, delta, effect = _table()
    accumulated = stat.StaticCeiling(EXPERTS + 1)
    accumulated.add(document, expert, delta)
    assert accumulated.share(np.append(effect, np.nan)).n_undefined == 0
    partly = np.append(effect, 0.0)
    partly[2] = np.nan
    assert accumulated.share(partly).n_undefined == np.count_nonzero(expert == 2)
    assert np.isnan(accumulated.oracle_scores()[:, EXPERTS]).all()


def test_where_no_expert_differs_there_is_no_share_of_the_ceiling():
    for seed in range(20):
        document, expert, delta, _ = _table(spread=0.0, seed=seed)
        accumulated = _accumulated(document, expert, delta)
        if accumulated.ceiling().share < 0:
            assert np.isnan(accumulated.share(np.arange(8.0)).of_ceiling)
            return
    pytest.fail("a ceiling of nothing was never below 0: it is biased")


@pytest.mark.usefixtures("unchecked")
def test_the_ceiling_refuses_what_it_cannot_use():
    document, expert, delta, _ = _table(documents=5)
    accumulated = _accumulated(document, expert, delta)
    with pytest.raises(stat.DegenerateSample, match="ranks nothing"):
        accumulated.share(np.full(EXPERTS, 3.0))
    with pytest.raises(ValueError, match=r"8 values, got shape \(9,\)"):
        accumulated.share(np.arange(9.0))
    with pytest.raises(ValueError, match="1 of 600 values of delta are NaN"):
        accumulated.add(document, expert, np.where(np.arange(600).reshape(200, 3) == 5, np.nan, delta))
    with pytest.raises(ValueError, match="experts must be 0 to 7, got 1 to 8"):
        accumulated.add(document, expert + 1, delta)
    with pytest.raises(ValueError, match="got 2 after 3"):
        accumulated.add(document, expert[:, :2], delta[:, :2])
    with pytest.raises(stat.DegenerateSample, match="documents in 2 folds"):
        _accumulated(document[:80], expert[:80], delta[:80]).ceiling()
    with pytest.raises(stat.DegenerateSample, match="no variance to share"):
        _accumulated(document, expert, np.zeros_like(delta)).ceiling()
