"""Samples of removals and what is estimated from them: unbiased, and with intervals that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from hooked_moe.statistics.difference_estimates import (
    N_BINS,
    SamplingVariance,
    SavingVariance,
    Z,
    corrections,
    error_ratios,
    fold_of,
    half_width_over_documents,
    size_bin,
)
from hooked_moe.statistics.removal_sample import (
    MINIMUM_PER_EXPERT,
    UNIFORM_SHARE,
    RemovalSample,
    UniformNumbers,
    least_probabilities,
    removal_size,
    sample_factor,
)

LAYERS, EXPERTS, N = 2, 6, 6000


class Heavy:
    """Removals of which few cost much, and a cheap estimate that misses most of these."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        self.axis = random.integers(0, LAYERS, N)
        self.expert = random.choice(EXPERTS, N, p=[0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
        self.document = np.sort(random.integers(0, 20, N))
        gap = np.exp(random.normal(0, 1.2, N))
        self.bend = 0.01 * gap**2 * np.exp(random.normal(0, 0.5, N))
        self.first_order = 0.02 * gap * random.standard_t(4, N)
        self.effect = self.first_order + 1.8 * self.bend * np.exp(random.normal(0, 0.8, N))
        self.features = np.stack([self.bend, 0.01 * gap**2], axis=1)
        self.size = removal_size(self.first_order, self.first_order + self.bend, gap, np.full(1, 0.01))
        counts = np.zeros((LAYERS, EXPERTS), np.int64)
        np.add.at(counts, (self.axis, self.expert), 1)
        self.counts, self.cell = counts, self.axis * EXPERTS + self.expert

    def sample(self, share: float) -> RemovalSample:
        least = least_probabilities(self.counts, share)
        return RemovalSample(np.ones(LAYERS), least, sample_factor(least[self.axis, self.expert], self.size, share))

    def totals(self, p: np.ndarray, seed: int) -> tuple[np.ndarray, SamplingVariance]:
        """Of every expert, from one draw."""
        drawn = np.flatnonzero(np.random.default_rng(seed).random(N) < p)
        axis, fold = self.axis, fold_of(self.document)
        missed = (self.effect - self.first_order)[drawn]
        own = (missed, self.features[drawn], p[drawn], self.size[drawn], axis[drawn])
        beta = corrections(*own, fold[drawn], LAYERS)
        estimate = self.first_order + (self.features * beta[axis, fold]).sum(axis=1)
        error = self.effect[drawn] - estimate[drawn]
        estimate[drawn] += error / p[drawn]
        ratios = error_ratios(error, p[drawn], self.size[drawn], axis[drawn], LAYERS)
        v = error**2 * (1 - p[drawn]) / p[drawn] ** 2
        spread = self.size**2 * (1 - p) / p * ratios[axis, size_bin(self.size)]
        by = [np.bincount(self.cell[drawn], x, LAYERS * EXPERTS) for x in (v, v**2)]
        return np.bincount(self.cell, estimate), SamplingVariance(*by, np.bincount(self.cell, spread))


@pytest.fixture(scope="module")
def heavy() -> Heavy:
    return Heavy()


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_a_share_is_drawn_over_a_floor_and_every_expert_has_its_minimum(share: float, heavy: Heavy) -> None:
    p = heavy.sample(share).probability(heavy.axis, heavy.expert, heavy.size)
    assert p.sum() == pytest.approx(share * N, rel=1e-6)
    assert p.min() >= UNIFORM_SHARE * share
    assert p.max() <= 1
    expected = np.bincount(heavy.cell, p)
    minimum = min(MINIMUM_PER_EXPERT, share * N / 2 / (LAYERS * EXPERTS))
    assert (expected >= np.minimum(minimum, heavy.counts.ravel()) - 1e-9).all()


def test_what_could_cost_more_is_drawn_more_often(heavy: Heavy) -> None:
    p = heavy.sample(0.05).probability(heavy.axis, heavy.expert, heavy.size)
    large = heavy.size > np.quantile(heavy.size, 0.99)
    assert p[large].mean() > 10 * p[~large].mean()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float, heavy: Heavy) -> None:
    with pytest.raises(ValueError, match="share of the removals"):
        least_probabilities(heavy.counts, share)


def test_numbers_of_a_document_do_not_depend_on_the_pieces_it_comes_in() -> None:
    whole = UniformNumbers(5).of(7, (6, 2, 3))
    numbers = UniformNumbers(5)
    pieces = [numbers.of(7, (4, 2, 3)), numbers.of(7, (2, 2, 3))]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(numbers.of(8, (6, 2, 3)), whole)


def test_estimates_have_no_bias_and_intervals_hold_the_truth(heavy: Heavy) -> None:
    p = heavy.sample(0.05).probability(heavy.axis, heavy.expert, heavy.size)
    truth = np.bincount(heavy.cell, heavy.effect)
    draws = [heavy.totals(p, seed) for seed in range(200)]
    totals = np.stack([total for total, _ in draws])
    z = (totals.mean(axis=0) - truth) / (totals.std(axis=0, ddof=1) / np.sqrt(len(draws)))
    assert np.abs(z).max() < 4
    half = Z * np.sqrt([variance.moderated() for _, variance in draws])
    own = Z * np.sqrt([variance.own for _, variance in draws])
    held, held_by_own = (np.mean(np.abs(totals - truth) <= width) for width in (half, own))
    assert 0.93 < held < 0.98
    assert held_by_own < held - 0.01  # what moderation is for


def test_a_documents_own_removals_do_not_decide_its_corrections(heavy: Heavy) -> None:
    drawn = np.arange(0, N, 7)
    fold = fold_of(heavy.document[drawn])
    missed = (heavy.effect - heavy.first_order)[drawn]
    rest = (heavy.features[drawn], np.full(len(drawn), 0.1), heavy.size[drawn], heavy.axis[drawn], fold, LAYERS)
    before, after = corrections(missed, *rest), corrections(np.where(fold == 0, 100.0, missed), *rest)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.allclose(before[:, 1], after[:, 1])


def test_too_few_removals_take_the_corrections_of_all_layers() -> None:
    random = np.random.default_rng(0)
    features = random.random((60, 2))
    axis = np.repeat([0, 1], [55, 5])
    fold = np.arange(60) % 2
    found = corrections(features @ [2.0, 0.5], features, np.full(60, 0.1), np.ones(60), axis, fold, 2)
    np.testing.assert_allclose(found, np.broadcast_to([2.0, 0.5], (2, 2, 2)))
    assert not corrections(np.ones(4), features[:4], np.ones(4), np.ones(4), axis[:4], fold[:4], 2).any()


def test_ratios_are_those_of_errors_and_sizes() -> None:
    random = np.random.default_rng(1)
    size = np.exp(random.normal(-3, 1, 20000))
    axis = random.integers(0, 2, 20000)
    error = size * np.where(axis == 0, 0.5, 2.0) * random.normal(size=20000)
    found = error_ratios(error, np.ones(20000), size, axis, 2)
    assert found.shape == (2, N_BINS)
    middle = size_bin(np.array([0.05]))[0]
    assert found[0, middle] == pytest.approx(0.25, rel=0.1)
    assert found[1, middle] == pytest.approx(4.0, rel=0.1)


def test_a_layer_of_small_errors_is_not_drawn_towards_those_of_others() -> None:
    """Also in bins where few of its removals were drawn."""
    random = np.random.default_rng(1)
    sizes, axes = zip(
        *[(np.exp(random.normal(-3, 1.5, n)), np.full(n, layer)) for layer, n in ((0, 5000), (1, 150))], strict=True
    )
    size, axis = np.concatenate(sizes), np.concatenate(axes)
    error = size * np.where(axis == 0, 1.0, 0.02) * random.normal(size=len(size))
    found = error_ratios(error, np.ones(len(size)), size, axis, 2)
    assert (found[1] < 0.01 * found[0]).all()
    exact = error_ratios(np.where(axis == 0, error, 0.0), np.ones(len(size)), size, axis, 2)
    assert (exact[1] > 0).all()  # no error was seen, which is no proof that there is none


def test_variances_are_between_their_own_and_the_models_and_add_up() -> None:
    one_large = SamplingVariance(np.array([4.0]), np.array([16.0]), np.array([1.0]))
    many_alike = SamplingVariance(np.array([4.0]), np.array([0.001]), np.array([1.0]))
    nothing = SamplingVariance(np.array([0.0]), np.array([0.0]), np.array([1.0]))
    assert 1 < one_large.moderated()[0] < 1.2 < 3.9 < many_alike.moderated()[0] < 4
    assert nothing.moderated()[0] == 1
    both = SamplingVariance(np.full((2, 1), 4.0), np.array([[16.0], [0.001]]), np.ones((2, 1))).over(0)
    assert (both.own[0], both.model[0]) == (8, 2)


def test_the_variance_over_documents_holds_what_was_drawn_too() -> None:
    random = np.random.default_rng(2)
    count = np.full((30, 1), 10)
    total = random.normal(5, 2, (30, 1))
    t = scipy.stats.t.ppf(0.975, 29)
    nothing = np.zeros(1)
    plain = half_width_over_documents(total, count, nothing, nothing)[0]
    assert plain == pytest.approx(t * np.sqrt(30 * total.var(ddof=1)) / 300)
    wider = half_width_over_documents(total, count, np.array([30.0]), np.array([50.0]))[0]
    assert wider == pytest.approx(t * np.sqrt(30 * total.var(ddof=1) - 30 + 50) / 300)
    assert np.isnan(half_width_over_documents(total[:2], count[:2], nothing, nothing)).all()


def test_the_variance_of_a_saving_is_that_of_its_sum() -> None:
    """Drawn again and again: of k effects at a position the saving is their mean less the first, of which a share may go."""
    random, k, positions, p = np.random.default_rng(3), 4, 50, 0.3
    error = random.normal(0, 1, (positions, k))
    v = error**2 * (1 - p) / p**2
    of_all, of_first = (SamplingVariance(*map(np.asarray, (x.sum(), (x**2).sum(), x.sum()))) for x in (v, v[:, 0]))
    terms = (random.random((4000, positions, k)) < p) * error / p
    for share in (0.0, 0.6, -0.5):
        own, moderated = SavingVariance(of_all, of_first, k).of(share)
        assert moderated == pytest.approx(own)
        totals = ((1 - share) * terms.mean(axis=2) - terms[:, :, 0]).sum(axis=1)
        assert totals.var() == pytest.approx(own * p, rel=0.08)  # `own` is as if all were drawn, of which a share of p is
