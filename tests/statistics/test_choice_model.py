"""Plackett-Luce against its definition, statsmodels' conditional logit and exact refits; stacking against a grid."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from statsmodels.discrete.conditional_models import ConditionalLogit

from hooked_moe import statistics as stat


def _orders(beta, documents=20, tokens=30, slots=4, seed=0):
    """Scores and loss changes whose order follows Plackett-Luce: utility plus Gumbel noise."""
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), tokens)
    score = stat.standardised(random.normal(size=(len(document), slots)))
    return score, beta * score + random.gumbel(size=score.shape), document


def _log_probability(beta, score, delta):
    """By the definition: choose the dearest, then the dearest of the rest, and so on; and the other way round."""
    total = 0.0
    for z, d in zip(score, delta, strict=True):
        for sign in (1, -1):
            left = list(np.argsort(-sign * d))
            while left:
                total += sign * beta * z[left[0]] - math.log(sum(math.exp(sign * beta * z[i]) for i in left))
                left = left[1:]
    return total / 2


def test_beta_maximises_the_probability_of_the_orders():
    score, delta, document = _orders(0.4, documents=5, tokens=8)
    fit = stat.plackett_luce(score, delta, document)
    best = scipy.optimize.minimize_scalar(lambda b: -_log_probability(b, score, delta), bounds=(-3, 3), method="bounded")
    assert fit.beta == pytest.approx(best.x, abs=1e-5)


def test_with_two_experts_it_is_conditional_logit():
    score, delta, document = _orders(0.7, slots=2)
    chosen = (delta == delta.max(axis=1, keepdims=True)).astype(int)
    model = ConditionalLogit(chosen.ravel(), score.reshape(-1, 1), groups=np.repeat(np.arange(len(score)), 2)).fit(disp=False)
    assert stat.plackett_luce(score, delta, document).beta == pytest.approx(float(model.params[0]), rel=1e-6)


def test_the_standard_deviation_is_the_clustered_sandwich():
    score, delta, document = _orders(0.3, documents=6, tokens=10)
    fit = stat.plackett_luce(score, delta, document)
    step = 1e-4

    def slope(rows):
        values = [_log_probability(fit.beta + s, score[rows], delta[rows]) for s in (-step, step)]
        return (values[1] - values[0]) / (2 * step)

    middle = [_log_probability(fit.beta + s, score, delta) for s in (-step, 0, step)]
    information = -(middle[0] - 2 * middle[1] + middle[2]) / step**2
    meat = sum(slope(document == d) ** 2 for d in range(6)) * 6 / 5
    assert fit.sd == pytest.approx(np.sqrt(meat) / information, rel=1e-4)


def test_savage_dickey_is_the_ratio_of_marginal_likelihoods():
    score, delta, document = _orders(0.1)
    fit = stat.plackett_luce(score, delta, document, prior_sd=0.5)
    grid = np.linspace(-3, 3, 20001)
    likelihood = scipy.stats.norm.pdf(fit.beta, grid, fit.sd)
    marginal = np.trapezoid(likelihood * scipy.stats.norm.pdf(grid, 0, 0.5), grid)
    assert fit.bf10 == pytest.approx(marginal / scipy.stats.norm.pdf(fit.beta, 0, fit.sd), rel=1e-6)


def test_orders_the_other_way_round_turn_the_sign_and_nothing_else():
    score, delta, document = _orders(0.4)
    one, other = stat.plackett_luce(score, delta, document), stat.plackett_luce(score, -delta, document)
    assert other.beta == pytest.approx(-one.beta)
    assert (other.sd, other.log_bf10) == pytest.approx((one.sd, one.log_bf10))


def test_a_metric_of_the_size_of_effects_without_their_sign_orders_nothing():
    random = np.random.default_rng(3)
    document = np.repeat(np.arange(40), 50)
    size = random.lognormal(size=(len(document), 6))
    delta = size * random.choice([-1.0, 1.0], size=size.shape)
    fit = stat.plackett_luce(stat.standardised(size.argsort(axis=1).argsort(axis=1)), delta, document)
    assert abs(fit.beta) < 3 * fit.sd
    assert fit.log_bf10 < 0


def test_planted_betas_are_found_and_their_errors_are_right():
    found = [stat.plackett_luce(*_orders(0.25, seed=seed)) for seed in range(60)]
    beta, sd = (np.array([getattr(fit, name) for fit in found]) for name in ("beta", "sd"))
    assert abs(beta.mean() - 0.25) < 4 * beta.std() / np.sqrt(60)
    assert np.mean(sd) == pytest.approx(beta.std(), rel=0.3)


def test_evidence_grows_with_the_effect_and_none_speaks_for_none():
    assert stat.plackett_luce(*_orders(0.0)).log_bf10 < 0
    assert stat.plackett_luce(*_orders(1.0)).log_bf10 > 50
    assert stat.plackett_luce(*_orders(3.0, documents=60, tokens=100)).bf10 == np.inf


def test_positions_without_an_order_are_left_out_and_counted():
    score, delta, document = _orders(0.5)
    delta[:7, 1] = delta[:7, 2]
    fit = stat.plackett_luce(score, delta, document)
    rest = stat.plackett_luce(score[7:], delta[7:], document[7:])
    assert (fit.n_tied, fit.n_positions) == (7, len(score) - 7)
    assert (fit.beta, fit.sd) == (rest.beta, rest.sd)


def test_leaving_a_document_out_is_fitting_the_others():
    score, delta, document = _orders(0.6, documents=15, tokens=12)
    ours = stat.leave_one_document_out(score, delta, document)
    for place, name in enumerate(ours.document):
        held_out = document == name
        beta = stat.plackett_luce(score[~held_out], delta[~held_out], document[~held_out]).beta
        assert ours.log_score[place] == pytest.approx(_log_probability(beta, score[held_out], delta[held_out]), abs=5e-3)
        assert ours.chance[place] == pytest.approx(_log_probability(0.0, score[held_out], delta[held_out]))


def test_a_blind_metric_predicts_worse_than_chance_and_a_good_one_better():
    _, delta, document = _orders(0.0)
    gains = []
    for seed in range(30):
        blind = stat.leave_one_document_out(_orders(0.0, seed=seed + 1)[0], delta, document)
        gains.append((blind.log_score - blind.chance).sum())
    assert np.mean(gains) < 0
    good = stat.leave_one_document_out(*_orders(0.5))
    assert (good.log_score - good.chance).sum() > 20


def test_choice_models_refuse_what_has_no_finite_fit():
    score, delta, document = _orders(0.5)
    with pytest.raises(stat.DegenerateSample, match="without fail"):
        stat.plackett_luce(score, score, document)
    with pytest.raises(stat.DegenerateSample, match="constant at every position"):
        stat.plackett_luce(np.ones_like(score), delta, document)
    with pytest.raises(stat.DegenerateSample, match="2 documents"):
        stat.plackett_luce(score[:60], delta[:60], document[:60])
    with pytest.raises(stat.DegenerateSample, match="orders nothing"):
        stat.standardised(np.ones((5, 3)))
    score[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 2400 values of score"):
        stat.plackett_luce(score, delta, document)


def test_stacking_finds_the_best_mixture_of_a_grid():
    log_score = np.random.default_rng(0).normal(size=(40, 3)) * 2
    log_score[:, 2] -= 1
    ours = stat.stacking_weights(log_score)
    best = max(
        np.mean(np.log(np.exp(log_score) @ (a, b, 1 - a - b)))
        for a, b in itertools.product(np.linspace(0, 1, 101), repeat=2)
        if a + b <= 1
    )
    assert best <= ours.log_score + ours.gap
    assert ours.log_score == pytest.approx(best, abs=1e-4)
    assert ours.gap < 1e-6
    assert ours.weight.sum() == pytest.approx(1)


def test_stacking_gives_a_dominated_model_nothing_and_never_underflows():
    random = np.random.default_rng(1)
    good = -3000 + 50 * random.normal(size=(30, 1))
    result = stat.stacking_weights(np.hstack([good, good - 40]))
    assert result.weight == pytest.approx([1, 0], abs=1e-5)
    assert result.log_score == pytest.approx(good.mean(), abs=1e-5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        stat.stacking_weights(np.array([[0.0, -np.inf]]))
