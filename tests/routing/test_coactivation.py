"""Co-activation and transitions against loops over tokens, and against routings whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hooked_moe.routing import Coactivation, RoutingTable, Transition, coactivation, expert_pairs, transition
from tests.support.routes import random_experts, routing_of_experts

E, K = 7, 3


@pytest.fixture
def experts() -> np.ndarray:
    return random_experts(np.random.default_rng(0), 100, 3, K, E)


@pytest.fixture
def table(experts: np.ndarray) -> RoutingTable:
    return routing_of_experts(experts, np.repeat(np.arange(5), 20), n_experts=E, layers=[1, 2, 4])


def loop_counts(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both, first, second = np.zeros((E, E), int), np.zeros(E, int), np.zeros(E, int)
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        for i in range(E):
            first[i] += i in a
            second[i] += i in b
            for j in range(E):
                both[i, j] += i in a and j in b
    return both, first, second


def assert_as_counted(result: Coactivation | Transition, place: int, one: np.ndarray, other: np.ndarray) -> None:
    both, first, second = loop_counts(one, other)
    np.testing.assert_array_equal(result.count[place], both)
    np.testing.assert_allclose(result.share[place], both / first[:, None])
    np.testing.assert_allclose(result.lift[place], 100 * both / np.outer(first, second))
    for i in range(E):
        for j in range(E):
            a, b = (one == i).any(-1), (other == j).any(-1)
            np.testing.assert_allclose(result.phi[place, i, j], np.corrcoef(a, b)[0, 1], atol=1e-12)


def test_coactivation_is_that_of_a_loop_over_tokens(table: RoutingTable, experts: np.ndarray) -> None:
    result = coactivation(table)
    assert result.layers == [1, 2, 4]
    for place in range(3):
        assert_as_counted(result, place, experts[:, place], experts[:, place])
        np.testing.assert_allclose(np.diagonal(result.share[place]), 1)
        np.testing.assert_allclose(result.share[place].sum(-1), K)
    one = coactivation(table, [4])
    np.testing.assert_array_equal(one.lift_low, result.lift_low[2:])
    assert one.layers == [4]


def test_transition_is_that_of_a_loop_over_tokens(table: RoutingTable, experts: np.ndarray) -> None:
    result = transition(table)
    assert (result.layers, result.next_layers) == ([1, 2], [2, 4])
    for place in range(2):
        assert_as_counted(result, place, experts[:, place], experts[:, place + 1])
        np.testing.assert_allclose(result.share[place].sum(-1), K)
    assert transition(table, [2]).next_layers == [4]
    with pytest.raises(ValueError, match=r"no layer of this table comes after layer 4: it has \[1, 2, 4\]"):
        transition(table, [4])
    with pytest.raises(ValueError, match=r"layers \[3\] are not in this table"):
        coactivation(table, [3])


def test_shuffled_routing_has_a_lift_of_one() -> None:
    """Layers that choose independently, token by token: lift 1 from layer to layer, and its known value within a layer."""
    random = np.random.default_rng(3)
    experts = random_experts(random, 24_000, 2, K, E)
    experts[:, 1] = random.permutation(experts[:, 1])
    table = routing_of_experts(experts, np.repeat(np.arange(60), 400), n_experts=E)
    result = transition(table)
    np.testing.assert_allclose(result.lift, 1, atol=0.06)
    np.testing.assert_allclose(result.phi, 0, atol=0.03)
    assert 0.85 < ((result.lift_low < 1) & (result.lift_high > 1)).mean() <= 1
    uniform = np.argsort(random.random((24_000, 1, E)))[..., :K]
    within = coactivation(routing_of_experts(uniform, np.repeat(np.arange(60), 400), n_experts=E)).lift[0]
    np.testing.assert_allclose(within[~np.eye(E, dtype=bool)], (1 - 1 / K) / (1 - 1 / E), atol=0.04)


def test_a_planted_path_is_found() -> None:
    experts = random_experts(np.random.default_rng(4), 600, 2, 2, E)
    goes = (experts[:, 0] == 2).any(-1)
    experts[:, 1] = [[5, 1]]
    experts[~goes, 1] = [[3, 1]]
    result = transition(routing_of_experts(experts, np.repeat(np.arange(6), 100), n_experts=E))
    assert result.share[0, 2, 5] == 1
    assert result.phi[0, 2, 5] == pytest.approx(1)
    assert np.nanargmax(np.where(np.isnan(result.phi[0]), -1, result.phi[0])) == 2 * E + 5
    assert np.isnan(result.phi[0, 2, 1]), "expert 1 serves every token"
    assert np.isnan(result.lift[0, 2, 0]), "expert 0 serves none"


def test_many_documents_are_counted_in_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_experts(np.random.default_rng(5), 600, 1, K, E)
    table = routing_of_experts(experts, np.repeat(np.arange(120), 5), n_experts=E)
    result = coactivation(table)
    both, *_ = loop_counts(experts[:, 0], experts[:, 0])
    np.testing.assert_array_equal(result.count[0], both)
    monkeypatch.setattr(expert_pairs, "MOST_CLUSTERS", 1000)
    by_document = coactivation(table)
    np.testing.assert_array_equal(by_document.lift, result.lift)
    wide = by_document.lift_high - by_document.lift_low
    np.testing.assert_allclose((result.lift_high - result.lift_low).mean(), wide[np.isfinite(wide)].mean(), rtol=0.1)


def test_results_are_saved_and_drawn(table: RoutingTable, tmp_path: Path) -> None:
    for result, kind in ((coactivation(table), Coactivation), (transition(table), Transition)):
        result.save(tmp_path / "pairs.parquet")
        again = kind.load(tmp_path / "pairs.parquet")
        assert again.attributes() == result.attributes()
        np.testing.assert_array_equal(again.lift_high, result.lift_high)
        assert result.table().num_rows == len(result.layers) * E * E
    axes = transition(table).plot("lift", layer=2).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("expert of layer 2", "expert of layer 4")
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), transition(table).lift[1])
    drawn = coactivation(table).plot().axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, np.where(np.eye(E), np.nan, coactivation(table).phi[0]))
    with pytest.raises(ValueError, match="unknown column 'lifts'; did you mean 'lift"):
        coactivation(table).plot("lifts")
