"""Specialisation, committees and agreement: loops over tokens, and planted routings."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hooked_moe.routing import (
    DomainSpecialisation,
    RoutingAgreement,
    RoutingTable,
    StandingCommittee,
    VocabularySpecialisation,
    domain_specialisation,
    routing_agreement,
    standing_committee,
    vocabulary_specialisation,
)
from hooked_moe.statistics import ratio_bootstrap
from tests.support.routes import random_experts, routing_of_experts

E, K, LAYERS = 6, 2, [0, 3]
DOCUMENTS = np.repeat(np.arange(8), (10, 15, 12, 13, 10, 20, 8, 12))
DOMAINS = ["x", "y", "x", "y", "x", "y", "x", "y"]


@pytest.fixture
def experts() -> np.ndarray:
    return random_experts(np.random.default_rng(0), 100, 2, K, E)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 9, 100)


@pytest.fixture
def weights() -> np.ndarray:
    return -np.sort(-np.random.default_rng(2).random((100, 2, K)).astype(np.float32))


@pytest.fixture
def table(experts: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> RoutingTable:
    return routing_of_experts(experts, DOCUMENTS, n_experts=E, layers=LAYERS, token=tokens, weight=weights, domains=DOMAINS)


def test_domain_specialisation_is_the_share_of_the_domains_tokens(table: RoutingTable, experts: np.ndarray) -> None:
    result = domain_specialisation(table)
    domain = np.array(DOMAINS)[DOCUMENTS]
    for layer in range(2):
        for expert in range(E):
            for place, name in enumerate(["x", "y"]):
                own = [expert in chosen for chosen, of in zip(experts[:, layer].tolist(), domain, strict=True) if of == name]
                assert result.share[layer, expert, place] == pytest.approx(np.mean(own))
    np.testing.assert_allclose(result.share.sum(axis=1), K)
    assert (result.uniform, result.domains, result.layers) == (K / E, ["x", "y"], LAYERS)
    own = [d for d in range(8) if DOMAINS[d] == "y"]
    served = np.array([[(experts[d == DOCUMENTS, 1] == 3).sum()] for d in own])
    expected = ratio_bootstrap(served, np.array([[(d == DOCUMENTS).sum()] for d in own]))
    np.testing.assert_allclose((result.low[1, 3, 1], result.high[1, 3, 1]), (expected.low[0], expected.high[0]))
    np.testing.assert_array_equal(domain_specialisation(table, [3]).share, result.share[1:])


@pytest.mark.parametrize("of", ["input", "next"])
@pytest.mark.parametrize("positions", [1, 7, 1000])
def test_vocabulary_specialisation_is_the_share_of_the_tokens_occurrences(
    table: RoutingTable, experts: np.ndarray, tokens: np.ndarray, of: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = RoutingTable.grids
    monkeypatch.setattr(RoutingTable, "grids", lambda self, *columns: grids(self, *columns, positions=positions))
    result = vocabulary_specialisation(table, of=of, minimum=8)  # type: ignore[arg-type]
    occurrences: Counter[int] = Counter()
    counts: dict[tuple[int, int, int], int] = defaultdict(int)
    for at in range(100):
        if of == "next" and (at == 99 or DOCUMENTS[at + 1] != DOCUMENTS[at]):
            continue
        token = int(tokens[at if of == "input" else at + 1])
        occurrences[token] += 1
        for place, layer in enumerate(LAYERS):
            for expert in experts[at, place].tolist():
                counts[layer, expert, token] += 1
    expected = {key: (n, occurrences[key[2]]) for key, n in counts.items() if occurrences[key[2]] >= 8}
    rows = result.table().to_pylist()
    assert {(r["layer"], r["expert"], r["token"]): (r["count"], r["occurrences"]) for r in rows} == expected
    assert len(rows) == len(expected)
    assert [r["share"] for r in rows] == [r["count"] / r["occurrences"] for r in rows]
    order = [(r["layer"], r["expert"], -r["share"], -r["count"], r["token"]) for r in rows]
    assert order == sorted(order)
    best = result.tokens_of(3, 5, n=2).to_pylist()
    assert best == [r for r in rows if (r["layer"], r["expert"]) == (3, 5)][:2]


def test_the_committee_is_the_fewest_experts_that_carry_enough_in_every_domain(
    table: RoutingTable, experts: np.ndarray, weights: np.ndarray
) -> None:
    result = standing_committee(table, share=0.6)
    domain = np.array(DOMAINS)[DOCUMENTS]
    for layer in range(2):
        fewest = []
        for place, name in enumerate(["x", "y"]):
            mass = np.zeros(E)
            for at in np.flatnonzero(domain == name):
                for slot in range(K):
                    mass[experts[at, layer, slot]] += weights[at, layer, slot]
            mass /= mass.sum()
            np.testing.assert_allclose(result.mass[layer, :, place], mass, rtol=1e-6)
            size = next(n for n in range(1, E + 1) if any(mass[list(s)].sum() >= 0.6 for s in combinations(range(E), n)))
            assert result.member[layer, :, place].sum() == size
            assert mass[result.member[layer, :, place]].sum() >= 0.6
            fewest.append(set(np.flatnonzero(result.member[layer, :, place]).tolist()))
        assert set(result.committees[LAYERS[layer]]) == fewest[0] & fewest[1]
        carried = result.mass[layer][sorted(fewest[0] & fewest[1])].sum(axis=0)
        np.testing.assert_allclose(result.carried[layer], carried)
    assert standing_committee(table, share=1.0).standing.all()
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"share must be above 0 and at most 1, not {share}"):
            standing_committee(table, share=share)


def test_a_planted_committee_is_found() -> None:
    """Expert 4 serves every token of both domains with most of the weight; the others by domain."""
    other = np.where(np.array(DOMAINS)[DOCUMENTS] == "x", 0, 1)
    experts = np.stack([np.full(100, 4), other], axis=-1)[:, None]
    weight = np.broadcast_to([0.7, 0.3], experts.shape)
    table = routing_of_experts(experts, DOCUMENTS, n_experts=E, weight=weight, domains=DOMAINS)
    assert standing_committee(table).committees == {0: [4]}
    assert standing_committee(table, 0.9).committees == {0: [4]}
    np.testing.assert_allclose(standing_committee(table).carried, 0.7, rtol=1e-6)
    special = domain_specialisation(table)
    np.testing.assert_allclose(special.share[0, :2], np.eye(2))
    np.testing.assert_allclose(special.share[0, 4], 1)


def test_agreement_is_the_mean_jaccard_similarity(experts: np.ndarray) -> None:
    random = np.random.default_rng(7)
    other = np.where(random.random((100, 2, 1)) < 0.5, experts, random_experts(random, 100, 2, K, E))
    one, two = (routing_of_experts(x, DOCUMENTS, n_experts=E) for x in (experts, other))
    result = routing_agreement(one, two)
    for layer in range(2):
        sets = [(set(a), set(b)) for a, b in zip(experts[:, layer].tolist(), other[:, layer].tolist(), strict=True)]
        assert result.jaccard[layer] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in sets]))
        assert result.same_set[layer] == pytest.approx(np.mean([a == b for a, b in sets]))
        assert result.same_first[layer] == pytest.approx((experts[:, layer, 0] == other[:, layer, 0]).mean())
    assert (result.low < result.jaccard).all()
    assert (result.jaccard < result.high).all()
    self_agreement = routing_agreement(one, one)
    np.testing.assert_array_equal(self_agreement.jaccard, 1)
    assert np.isnan(self_agreement.low).all()
    narrower = routing_of_experts(other[..., :1], DOCUMENTS, n_experts=E)
    expected = np.mean([len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(experts[:, 1], other[:, 1, :1], strict=True)])
    assert routing_agreement(one, narrower).jaccard[1] == pytest.approx(expected)
    assert routing_agreement(one, narrower).same_set[1] == 0


def test_agreement_of_different_tokens_is_refused(experts: np.ndarray, tokens: np.ndarray) -> None:
    one = routing_of_experts(experts, DOCUMENTS, n_experts=E, token=tokens)
    with pytest.raises(ValueError, match="the tables differ in token: agreement is of two routings of the same tokens"):
        routing_agreement(one, routing_of_experts(experts, DOCUMENTS, n_experts=E))
    with pytest.raises(ValueError, match=r"the tables are of different tokens or layers: RoutingTable\(.*of layers \[0, 1\]"):
        routing_agreement(one, routing_of_experts(experts[:, :1], DOCUMENTS, n_experts=E, token=tokens))


def test_results_are_saved_and_drawn(table: RoutingTable, tmp_path: Path) -> None:
    results = {
        DomainSpecialisation: domain_specialisation(table),
        StandingCommittee: standing_committee(table),
        RoutingAgreement: routing_agreement(table, table),
        VocabularySpecialisation: vocabulary_specialisation(table, minimum=1),
    }
    for kind, result in results.items():
        result.save(tmp_path / "result.parquet")
        again = kind.load(tmp_path / "result.parquet")
        assert again.metadata() == result.metadata()
        for name in result.table().column_names:
            np.testing.assert_array_equal(again.table()[name].to_numpy(), result.table()[name].to_numpy())
    axes = domain_specialisation(table).plot(layer=0).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
    drawn = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(drawn, domain_specialisation(table).share[0].T - K / E)
    mass = standing_committee(table).plot().axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(mass, standing_committee(table).mass.mean(axis=-1))
    with pytest.raises(NotImplementedError, match="RoutingAgreement has no picture of its own"):
        results[RoutingAgreement].plot()
