"""The CUDA kernel of losses at targets, on the CPU, against log softmax in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe.kernels.cuda import launches
from hooked_moe.kernels.target_loss import as_sum
from tests.kernels.cuda import host

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def on_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, span: int | None = None, **options: bool) -> Tensor:
    """`hidden` is [parts, n, d_model]."""
    parts, rows, depth = hidden.shape
    span = span or launches.vocabulary_span(rows=rows, vocabulary=len(weight), dtype=weight.dtype)
    launch = launches.target_logprob(rows=rows, vocabulary=len(weight), span=span, parts=parts, dtype=weight.dtype)
    log_sums = host.empty(launch.grid[1], rows, dtype=torch.float32)
    target_logits = host.empty(rows, dtype=torch.float32)
    host.run(launch, log_sums, target_logits, hidden, weight, targets, rows, len(weight), depth, span, **options)
    return log_sums.logsumexp(0) - target_logits


def drawn(rows: int, vocabulary: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits with a standard deviation of 3, as language models have."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, depth, generator=generator)
    weight = (torch.randn(vocabulary, depth, generator=generator) * 3 * depth**-0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def by_definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "depth", "span"),
    [(1, 1, 1, 64), (5, 200, 33, 64), (130, 150, 8, 150), (7, 300, 40, 100), (3, 1000, 64, None)],
    ids=["one token", "odd sizes", "more rows than a tile", "spans of parts of tiles", "the span of the launch"],
)
def test_equals_log_softmax(rows: int, vocabulary: int, depth: int, span: int | None, dtype: torch.dtype) -> None:
    hidden, weight, targets = drawn(rows, vocabulary, depth, dtype)
    hidden = hidden.to(dtype)
    loss = on_kernel(hidden[None], weight, targets, span)
    torch.testing.assert_close(loss.double(), by_definition(hidden, weight, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_weights_take_the_hidden_states_of_float32(dtype: torch.dtype) -> None:
    hidden, weight, targets = drawn(9, 300, 70, dtype)
    loss = on_kernel(as_sum(hidden, dtype), weight, targets)
    torch.testing.assert_close(loss.double(), by_definition(hidden, weight, targets), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    hidden, weight, targets = drawn(20, 150, 16, dtype)
    hidden = (hidden * 300).to(dtype)
    loss = on_kernel(hidden[None], weight, targets)
    torch.testing.assert_close(loss.double(), by_definition(hidden, weight, targets), rtol=1e-5, atol=1e-3)


def test_a_target_outside_the_vocabulary_has_no_loss() -> None:
    hidden, weight, targets = drawn(6, 70, 16, torch.bfloat16)
    targets[:3] = torch.tensor([-1, 70, -100])
    loss = on_kernel(hidden[None].bfloat16(), weight, targets, span=64)
    assert loss.isnan().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_pointers_nor_the_order_of_threads_change_a_bit(dtype: torch.dtype) -> None:
    hidden, weight, targets = drawn(9, 200, 48, dtype)
    hidden = hidden[None].to(dtype)
    loss = on_kernel(hidden, weight, targets, span=64)
    assert torch.equal(on_kernel(off_by_one(hidden), off_by_one(weight), targets, span=64), loss)
    assert torch.equal(on_kernel(hidden, weight, targets, span=64, backwards=True), loss)


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def test_few_rows_are_spread_over_the_vocabulary_and_many_are_not() -> None:
    shape = {"vocabulary": 50304, "dtype": torch.bfloat16}
    assert launches.vocabulary_span(rows=1, **shape) == 128
    assert launches.vocabulary_span(rows=16384, **shape) == 128 * 50  # 393 tiles in 8 spans to 128 rows of blocks
    assert launches.vocabulary_span(rows=1 << 20, **shape) == 50304
    assert launches.target_logprob(rows=0, span=128, parts=1, **shape).is_empty


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 22)])
def test_two_halves_hold_twice_the_bits_of_one(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    parts = as_sum(x, dtype)
    assert parts.dtype == dtype
    error = (parts.double().sum(0) - x.double()).abs()
    assert (error <= x.abs() * 2.0**-bits + 2.0**-25).all()  # the smallest steps of float16
