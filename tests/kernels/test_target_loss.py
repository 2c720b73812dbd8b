"""Losses without the logits of all tokens in memory, against torch's cross-entropy of all logits at once in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.counterfactuals.engine import losses as engine_losses
from hooked_moe.kernels import target_loss as kernel

HALF = torch.bfloat16


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x.double() @ weight.double().T, targets, reduction="none").float()


def log_sum(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double().T).logsumexp(-1)


@pytest.mark.parametrize(("n", "d", "vocabulary"), [(0, 3, 5), (1, 1, 2), (63, 8, 7), (64, 8, 33), (200, 16, 10_001)])
def test_the_loss_is_cross_entropy_in_chunks_of_any_size(n: int, d: int, vocabulary: int) -> None:
    x, weight = draw(n, d), draw(vocabulary, d, seed=1)
    targets = torch.randint(vocabulary, (n,))
    torch.testing.assert_close(kernel.target_loss(x, weight, targets), reference(x, weight, targets), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variants", [0, 1, 3])
@pytest.mark.parametrize(("n", "d", "vocabulary"), [(1, 1, 2), (5, 8, 33), (5, 8, 8193), (7, 3, 12_301)])
def test_the_log_sum_moves_by_what_it_is_of_the_moved_logits(variants: int, n: int, d: int, vocabulary: int) -> None:
    x, weight, shifts = draw(n, d), draw(vocabulary, d, seed=1), draw(variants, n, d, seed=2)
    moved = kernel.log_sum_change(F.linear(x, weight).log_softmax(-1), shifts, weight)
    assert moved.shape == (variants, n)
    assert moved.dtype == torch.float64
    torch.testing.assert_close(moved, log_sum(x + shifts, weight) - log_sum(x, weight), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [80.0, 88.5, 200.0, 3000.0])
def test_logits_may_move_beyond_the_range_of_exponentials(size: float) -> None:
    x, weight = draw(6, 4), draw(700, 4, seed=1, scale=0.1)
    x[:, 0], weight[:, 0] = 0.0, 1.0
    shifts = torch.zeros(2, 6, 4)
    shifts[0, ::2, 0], shifts[1, 1::2, 0] = size, -size  # all logits alike
    shifts[0, 1, 1] = size  # some up and some down
    moved = kernel.log_sum_change(F.linear(x, weight).log_softmax(-1), shifts, weight)
    torch.testing.assert_close(moved, log_sum(x + shifts, weight) - log_sum(x, weight), atol=2e-6, rtol=2e-7)
    assert (moved[1, ::2] - kernel.log_total(F.linear(x, weight).log_softmax(-1))[::2]).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_of_the_sum_comes_with_the_loss(dtype: torch.dtype) -> None:
    x, weight, targets = draw(200, 16).to(dtype), draw(10_001, 16, seed=1).to(dtype), torch.randint(10_001, (200,))
    loss, log_sum = kernel.target_loss_and_log_sum(x, weight, targets)
    assert torch.equal(loss, kernel.target_loss(x, weight, targets))
    torch.testing.assert_close(log_sum, (x.double() @ weight.double().T).logsumexp(-1), atol=1e-5, rtol=1e-6)


def test_in_bfloat16_the_error_of_a_change_shrinks_with_the_shift() -> None:
    x, weight = draw(200, 64), draw(1000, 64, seed=1, scale=0.3).to(HALF)
    log_p = F.linear(x, weight.float()).log_softmax(-1)
    for scale in (1.0, 1e-2, 1e-4):
        shifts = draw(1, 200, 64, seed=2, scale=scale).to(HALF).float()
        moved = kernel.log_sum_change(log_p, shifts, weight)
        exact = log_sum(x + shifts, weight) - log_sum(x, weight)
        assert (moved - exact).abs().max() <= 0.02 * exact.abs().max() + 2e-6, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@torch.no_grad()
def test_losses_of_variants_are_those_of_their_residual_streams(dtype: torch.dtype) -> None:
    cfg = HookedMoEConfig(
        n_layers=1, d_model=32, d_vocab=67, n_ctx=16, n_heads=2, n_key_value_heads=2, d_head=16, num_experts=4,
        experts_per_token=2, d_expert=8, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedMoE(cfg)
    clean = draw(2, 9, 32, seed=1).to(dtype)
    variants = (clean + draw(3, 2, 9, 32, seed=2, scale=0.1)).to(dtype)
    targets = torch.randint(67, (2, 9))
    targets[:, -1] = -1
    losses = engine_losses.prediction_change(model, variants, clean, targets).losses
    logits = torch.stack([model.logits(one) for one in variants])
    wanted = F.cross_entropy(logits.flatten(0, 2), targets.expand(3, 2, 9).flatten(), ignore_index=-1, reduction="none")
    assert losses[..., -1].isnan().all()
    torch.testing.assert_close(losses[..., :-1], wanted.view(3, 2, 9)[..., :-1], atol=1e-5 if dtype != HALF else 1e-3, rtol=0)


@pytest.mark.parametrize("vocabulary", [5000, 12_301])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_a_variant_that_changes_nothing_has_the_loss_of_the_clean_run_to_the_bit(dtype: torch.dtype, vocabulary: int) -> None:
    cfg = HookedMoEConfig(
        n_layers=1, d_model=32, d_vocab=vocabulary, n_ctx=16, n_heads=2, n_key_value_heads=2, d_head=16, num_experts=4,
        experts_per_token=2, d_expert=8, dtype=dtype,
    )  # fmt: skip
    model = HookedMoE(cfg)
    clean = draw(2, 9, 32).to(dtype)
    targets = torch.randint(vocabulary, (2, 9))
    losses = engine_losses.prediction_change(model, torch.stack([clean, clean + 1]), clean, targets).losses
    assert torch.equal(losses[0], engine_losses.loss_at(model, clean[None], targets)[0])
    assert not torch.equal(losses[1], losses[0])
