"""Experts that tell texts apart: counts by hand, and a planted marker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.routing import ExpertContrast, detect_experts, record_routes, steer_routes
from hooked_moe.statistics.contingency import compare_shares
from tests.conftest import ARCHITECTURES, random_model
from tests.support.number_text import number_reader, token_ids

PAIRS = [
    (" ".join(map(str, token_ids(n, n))), " ".join(map(str, token_ids(m, 50 + m))))
    for n, m in ((9, 7), (12, 12), (5, 14), (20, 6))
]


@pytest.fixture(params=ARCHITECTURES)
def reader(request: pytest.FixtureRequest) -> HookedMoE:
    return number_reader(random_model, architecture=request.param)


@pytest.mark.parametrize("last", [None, 4])
def test_risk_differences_are_those_by_hand(reader: HookedMoE, last: int | None) -> None:
    contrast = detect_experts(reader, PAIRS, last_tokens=last)
    ratios = detect_experts(reader, PAIRS, "risk_ratio", last_tokens=last)
    layers, n = reader.cfg.moe_layers, reader.cfg.num_experts
    served, total = np.zeros((2, len(PAIRS), len(layers), n)), np.zeros((2, len(PAIRS)))
    for number, pair in enumerate(PAIRS):
        for side, text in enumerate(pair):
            routes = record_routes(reader, torch.tensor([[int(word) for word in text.split()]]))
            index = routes.expert_index[:, 0, -(last or 99) :]
            total[side, number] = index.shape[1]
            for layer in range(len(layers)):
                for expert in range(n):
                    served[side, number, layer, expert] = sum(expert in chosen for chosen in index[layer].tolist())
    shares = served.sum(1) / total.sum(1)[:, None, None]
    np.testing.assert_allclose(contrast.value, shares[0] - shares[1])
    np.testing.assert_allclose(contrast.first, shares[0])
    np.testing.assert_allclose(contrast.second, shares[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(ratios.value, shares[0] / shares[1])
    flat = served.reshape(2, len(PAIRS), -1)
    expected = compare_shares(flat[0], total[0], flat[1], total[1])
    np.testing.assert_allclose(contrast.low.ravel(), expected.low)
    assert contrast.layers == layers


def test_an_expert_that_the_second_texts_never_use_marks_the_first_most() -> None:
    """Its ratio is infinite; that of one which neither uses is none."""
    reader = number_reader(random_model)
    ratios = detect_experts(reader, PAIRS, "risk_ratio")
    value = np.full_like(ratios.value, np.nan)
    value[1] = [0.0, np.nan, 0.5, np.inf, 1.0, 2.0]
    contrast = replace(ratios, value=value)
    assert contrast.prefer(2) == {ratios.layers[1]: [3, 5]}
    assert contrast.avoid(2) == {ratios.layers[1]: [0, 2]}


def test_a_planted_marker_is_found_and_steers() -> None:
    """The router of layer 1 sends even tokens to expert 4 and odd ones to expert 2, whatever else it does."""
    model = number_reader(random_model)
    texts = [
        (" ".join(str(2 * n) for n in row), " ".join(str(2 * n + 1) for n in row))
        for row in np.random.default_rng(0).integers(0, 30, (5, 8))
    ]

    def marked(logits: torch.Tensor, hook: object) -> torch.Tensor:
        even = torch.tensor([[int(word) % 2 == 0 for word in text.split()] for text in current])
        logits[..., 4] = torch.where(even, 20.0, -20.0)
        logits[..., 2] = torch.where(even, -20.0, 20.0)
        return logits

    current: list[str] = []
    original = HookedMoE.run_with_cache

    def reading(self: HookedMoE, tokens: torch.Tensor, **options: object) -> object:
        current[:] = [" ".join(map(str, row)) for row in tokens.tolist()]
        return original(self, tokens, **options)

    with pytest.MonkeyPatch.context() as patch, model.hooks([("blocks.1.mlp.hook_router_logits", marked)]):
        patch.setattr(HookedMoE, "run_with_cache", reading)
        contrast = detect_experts(model, texts)
    assert (contrast.value[1, 4], contrast.value[1, 2]) == (1, -1)
    assert contrast.prefer(1) == {1: [4]}
    assert contrast.avoid(1) == {1: [2]}
    assert (contrast.low[1, 4], contrast.high[1, 4]) == (1, 1)
    with steer_routes(model, contrast.prefer(4), contrast.avoid(2)):
        routes = record_routes(model, torch.tensor([[1, 3, 5]]))
    assert bool((routes.expert_index[1] == 4).any(-1).all())
    assert not bool((routes.expert_index[1] == 2).any())


def test_no_more_experts_are_preferred_than_a_token_has(reader: HookedMoE, tmp_path: Path) -> None:
    contrast = detect_experts(reader, PAIRS)
    k, layers = reader.cfg.experts_per_token, reader.cfg.moe_layers
    everything = contrast.prefer(100)
    assert {layer: len(experts) for layer, experts in everything.items()} == dict.fromkeys(layers, k)
    chosen = contrast.avoid(5)
    assert sum(map(len, chosen.values())) == 5
    worst = np.sort(contrast.value, axis=None)[:5]
    found = [contrast.value[layers.index(layer), expert] for layer, experts in chosen.items() for expert in experts]
    np.testing.assert_array_equal(np.sort(found), worst)
    contrast.save(tmp_path / "contrast.parquet")
    again = ExpertContrast.load(tmp_path / "contrast.parquet")
    assert again.prefer(3) == contrast.prefer(3)
    assert contrast.plot().axes[0].get_xlabel() == "expert"


def test_bad_requests_are_answered(unchecked: None) -> None:
    model = number_reader(random_model)
    with pytest.raises(ValueError, match="statistic must be one of 'risk_difference', 'risk_ratio', not 'odds'"):
        detect_experts(model, PAIRS, "odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no pairs of texts given"):
        detect_experts(model, [])
    with pytest.raises(ValueError, match=r"expected pairs of texts, \(first, second\), not 'ab'"):
        detect_experts(model, ["ab"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="last_tokens must be 1 or more, not 0"):
        detect_experts(model, PAIRS, last_tokens=0)
