"""The memory that a measurement takes, as torch's allocator counts it, against the budget it was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects, progressive_effects
from hooked_moe.counterfactuals.engine import chunks
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.readouts import KL, LossAfter
from tests.conftest import random_config

LENGTH = 32
UNUSED = (64 << 20) - (8 << 20)
"""Of what is set aside for logits, which are far from 64 MiB with a vocabulary of 2,000."""
WIDE = {"d_model": 256, "d_vocab": 2000, "n_ctx": LENGTH, "d_expert": 16, "n_layers": 3}
MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "position": expert_effects,
    "from position": lambda *args, **options: expert_effects(*args, scope="from_position", readouts=[LossAfter(2)], **options),
    "kl": lambda *args, **options: expert_effects(*args, readouts=[KL()], **options),
    "sequence": lambda *args, **options: expert_effects(*args, scope="sequence", **options),
    "progressive": lambda model, tokens, **options: progressive_effects(model, tokens, [1, 2], **options),
}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors allocated during a run held at once, its results among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    assert measured.profiler is not None
    held = peak = 0
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens in a block at once, so that what a budget divides is most of the memory."""
    monkeypatch.setattr(chunks, "VARIANT_TOKENS_PER_CHUNK", 64)


def model_and_budget(dtype: torch.dtype, products: torch.dtype | None = None) -> tuple[HookedMoE, int]:
    torch.manual_seed(0)
    model = HookedMoE(random_config("deepseek", **WIDE, dtype=dtype))
    demand = demand_of(model.cfg, LENGTH, products=products)
    return model, demand.fixed + demand.row + 4 * LENGTH * demand.variant_token


@pytest.mark.usefixtures("unchecked", "narrow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_a_measurement_stays_within_its_memory_budget(measurement: str, dtype: torch.dtype) -> None:
    model, budget = model_and_budget(dtype)
    tokens = torch.randint(2000, (3, LENGTH))
    assert peak_bytes(lambda: MEASUREMENTS[measurement](model, tokens, memory_budget=budget)) <= budget - UNUSED


@pytest.mark.usefixtures("unchecked", "narrow")
@pytest.mark.parametrize("share_picked", [None, 0.3])
def test_so_does_one_by_products_of_the_change(share_picked: float | None) -> None:
    model, budget = model_and_budget(torch.float32, torch.bfloat16)
    tokens, options = torch.randint(2000, (3, LENGTH)), {"memory_budget": budget, "products": "bfloat16"}
    if share_picked is not None:
        options["picks"] = torch.rand(2, 3, LENGTH, model.cfg.experts_per_token) < share_picked
    assert peak_bytes(lambda: expert_effects(model, tokens, **options)) <= budget - UNUSED


@pytest.mark.usefixtures("unchecked", "narrow")
def test_a_budget_is_what_keeps_memory_from_growing_with_the_batch() -> None:
    model, budget = model_and_budget(torch.float32)
    tokens = torch.randint(2000, (24, LENGTH))
    assert peak_bytes(lambda: expert_effects(model, tokens, memory_budget=budget)) <= budget - UNUSED
    assert peak_bytes(lambda: expert_effects(model, tokens)) > budget - UNUSED


@pytest.mark.usefixtures("unchecked")
def test_a_small_budget_lets_fewer_variants_through_a_block_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = HookedMoE(random_config("deepseek", **WIDE))
    fewest = demand_of(model.cfg, LENGTH, chunk_size=LENGTH)
    budget = fewest.fixed + fewest.row + 4 * LENGTH * fewest.variant_token
    assert budget - UNUSED < (demand_of(model.cfg, LENGTH).fixed - UNUSED) / 4
    tokens = torch.randint(2000, (2, LENGTH))
    within: list[Any] = []
    assert peak_bytes(lambda: within.append(expert_effects(model, tokens, memory_budget=budget))) <= budget - UNUSED
    torch.testing.assert_close(within[0].delta_loss, expert_effects(model, tokens).delta_loss, atol=1e-5, rtol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"take [\d,]+ at least"):
        expert_effects(model, tokens, memory_budget=fewest.fixed)
