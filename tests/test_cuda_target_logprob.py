"""The CUDA kernel of losses at targets, on the CPU, against log softmax in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe.kernels import launches
from hooked_moe.kernels.target_loss import as_sum
from tests.cuda import host

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
