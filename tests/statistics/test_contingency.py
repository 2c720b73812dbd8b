"""Lift, phi and risk differences against loops over tokens; their intervals against a loop over resamples and a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_moe.statistics.contingency import association, compare_shares


@pytest.fixture
def counts() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(6), (30, 12, 40, 25, 7, 33))
    first = random.random((len(documents), 3)) < (0.2, 0.5, 0.7)
    second = (random.random((len(documents), 4)) < 0.3) | (first[:, :1] & (random.random((len(documents), 4)) < 0.5))
    by_document = [documents == number for number in range(6)]
    both = np.stack([first[own].astype(int).T @ second[own].astype(int) for own in by_document])
    return (
        both,
        np.stack([first[own].sum(0) for own in by_document]),
        np.stack([second[own].sum(0) for own in by_document]),
        np.array([own.sum() for own in by_document]),
        first,
        second,
    )


def test_lift_and_phi_are_those_of_the_tokens(counts: tuple[np.ndarray, ...]) -> None:
    both, one, other, total, first, second = counts
    result = association(both, one, other, total)
    for i in range(3):
        for j in range(4):
            expected = (first[:, i] & second[:, j]).mean() / (first[:, i].mean() * second[:, j].mean())
            assert result.lift[i, j] == pytest.approx(expected)
            assert result.phi[i, j] == pytest.approx(np.corrcoef(first[:, i], second[:, j])[0, 1])
    assert (result.lift_low < result.lift).all()
    assert (result.lift < result.lift_high).all()
    assert (result.phi_low < result.phi_high).all()


def test_intervals_are_percentiles_over_resampled_documents(counts: tuple[np.ndarray, ...]) -> None:
    both, one, other, total, *_ = counts
    result = association(both, one, other, total, n_resamples=300, seed=5)
    drawn = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=300)
    lifts, phis = [], []
    for times in drawn:
        rows = np.repeat(np.arange(6), times)
        n, a, b, ab = total[rows].sum(), one[rows].sum(0), other[rows].sum(0), both[rows].sum(0)
        p, q, pq = a[1] / n, b[2] / n, ab[1, 2] / n
        lifts.append(pq / (p * q))
        phis.append((pq - p * q) / np.sqrt(p * (1 - p) * q * (1 - q)))
    np.testing.assert_allclose((result.lift_low[1, 2], result.lift_high[1, 2]), np.quantile(lifts, (0.025, 0.975)))
    np.testing.assert_allclose((result.phi_low[1, 2], result.phi_high[1, 2]), np.quantile(phis, (0.025, 0.975)))


def test_what_never_occurs_has_no_lift_and_few_documents_no_interval(counts: tuple[np.ndarray, ...]) -> None:
    both, one, other, total, *_ = counts
    both, one = both.copy(), one.copy()
    both[:, 0], one[:, 0] = 0, 0
    result = association(both, one, other, total)
    assert np.isnan(result.lift[0]).all()
    assert np.isnan(result.lift_low[0]).all()
    assert np.isfinite(result.lift[1:]).all()
    few = association(both[:2], one[:2], other[:2], total[:2])
    assert np.isfinite(few.lift[1:]).all()
    assert np.isnan(few.lift_low).all()
    assert np.isnan(association(both, one, other, total, n_resamples=0).phi_low).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """60 documents of tokens that choose alike within a document, and independently of the other choice: lift 1."""
    random = np.random.default_rng(1)
    hits = []
    for _ in range(12):
        rate_one, rate_other = random.beta(4, 8, (60, 4)), random.beta(4, 8, (60, 5))
        first = random.random((60, 30, 4)) < rate_one[:, None]
        second = random.random((60, 30, 5)) < rate_other[:, None]
        both = np.einsum("dti,dtj->dij", first.astype(int), second.astype(int))
        result = association(both, first.sum(1), second.sum(1), np.full(60, 30), n_resamples=400)
        hits.append((result.lift_low < 1) & (result.lift_high > 1))
    assert 0.88 < np.mean(hits) < 0.99


def test_risk_differences_and_ratios_are_those_by_hand() -> None:
    first, second = np.array([[3, 0], [1, 2], [2, 2]]), np.array([[1, 1], [0, 4], [1, 3]])
    n, m = np.array([10, 5, 5]), np.array([4, 8, 8])
    result = compare_shares(first, n, second, m)
    np.testing.assert_allclose(result.estimate, [6 / 20 - 2 / 20, 4 / 20 - 8 / 20])
    np.testing.assert_allclose(compare_shares(first, n, second, m, ratio=True).estimate, [3, 0.5])
    drawn = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=1000)
    values = [(w @ first)[0] / (w @ n) - (w @ second)[0] / (w @ m) for w in drawn]
    np.testing.assert_allclose((result.low[0], result.high[0]), np.quantile(values, (0.025, 0.975)))
    assert np.isnan(compare_shares(first[:2], n[:2], second[:2], m[:2]).low).all()
