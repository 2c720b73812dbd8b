"""Shapley and Banzhaf shares, against all orders of the players."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from hooked_moe.statistics.coalitions import banzhaf_values, shapley_values


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_shares_are_the_mean_gain_over_all_orders(players: int) -> None:
    value = np.random.default_rng(players).normal(size=(1 << players, 2))
    gains = np.zeros((players, 2))
    orders = list(permutations(range(players)))
    for order in orders:
        coalition = 0
        for player in order:
            gains[player] += value[coalition | 1 << player] - value[coalition]
            coalition |= 1 << player
    shares = shapley_values(value)
    np.testing.assert_allclose(shares, gains / len(orders))
    np.testing.assert_allclose(shares.sum(axis=0), value[-1] - value[0])


def test_additive_values_give_everyone_what_they_bring() -> None:
    worth = np.array([1.0, -2.0, 0.5])
    value = np.array([sum(worth[p] for p in range(3) if coalition >> p & 1) for coalition in range(8)])
    np.testing.assert_allclose(shapley_values(value), worth)
    np.testing.assert_allclose(banzhaf_values(value), worth)


def test_a_vote_of_three_where_two_decide() -> None:
    value = np.array([float(coalition.bit_count() >= 2) for coalition in range(8)])
    np.testing.assert_allclose(shapley_values(value), [1 / 3] * 3)
    np.testing.assert_allclose(banzhaf_values(value), [1 / 2] * 3)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_values_must_be_those_of_all_coalitions(n: int) -> None:
    with pytest.raises(ValueError, match="not those of all coalitions"):
        shapley_values(np.zeros(n))
