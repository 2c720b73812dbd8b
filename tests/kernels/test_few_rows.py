"""Products of few rows, which are made transposed, against products in double precision; and that nobody need know of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hooked_moe.counterfactuals.engine.products import ProductsOfChange
from hooked_moe.kernels.cpu import few_rows
from hooked_moe.kernels.cpu.grouped_matmul import grouped_matmul
from tests.conftest import EVERY_ARCHITECTURE, random_model


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_LARGE", 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close_to_double(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_product_of_few_rows_is_the_product(rows: int, d_in: int, d_out: int, strided: bool) -> None:
    x = random(rows, 2 * d_in)[:, ::2] if strided else random(rows, d_in)
    weight, bias = random(d_out, d_in, seed=1), random(d_out, seed=2)
    assert few_rows.are_few(rows, x, weight) == (1 <= rows <= few_rows.FEW)
    assert_close_to_double(few_rows.product(x, weight), x.double() @ weight.double().T)
    out = few_rows.linear(x[None], weight, bias)
    assert out.shape == (1, rows, d_out)
    assert out.is_contiguous()
    assert_close_to_double(out, F.linear(x[None].double(), weight.double(), bias.double()))


def test_rows_of_experts_are_few_or_many_as_each_has_them() -> None:
    counts = [1, 0, 2, 7, 0, 4, 5, 3]
    x, weight = random(sum(counts), 24), random(len(counts), 16, 24, seed=1)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("noi,ni->no", weight[owner].double(), x.double())
    assert_close_to_double(grouped_matmul(x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_are_those_of_torch(rows: int) -> None:
    gradients = []
    for linear in (few_rows.linear, F.linear):
        x, weight, bias = (t.requires_grad_() for t in (random(1, rows, 9), random(5, 9, seed=1), random(5, seed=2)))
        gradients.append(torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias)))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_on_a_single_core_long_rows_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = few_rows._LONG + 1, few_rows._LONG
    for threads, expected in ((1, (False, True)), (2, (True, True))):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert tuple(few_rows.are_few(1, random(1, d_in), random(2, d_in)) for d_in in (long, short)) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    x, weight = random(2, 8).to(dtype), random(4, 8).to(dtype)
    assert not few_rows.are_few(2, x, weight)
    assert torch.equal(few_rows.linear(x, weight), F.linear(x, weight))
    assert torch.equal(few_rows.product(x, weight), x @ weight.T)


@pytest.mark.parametrize("bias", [None, torch.ones(4)])
def test_autocast_stays_in_charge_of_the_dtype(bias: Tensor | None) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert few_rows.linear(random(1, 8), random(4, 8), bias).dtype == torch.bfloat16


class Calls(TorchFunctionMode):
    """The functions that are called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_torch_sees_the_call() -> None:
    with Calls() as calls:
        few_rows.linear(random(1, 8), random(4, 8))
    assert few_rows.linear in calls.seen


def test_products_of_the_change_take_few_rows_too() -> None:
    """A single token in a clean run and its variants: whatever the components call, it goes through the mode."""
    weight, clean, changed = random(6, 8), random(1, 1, 8, seed=1), random(1, 1, 8, seed=2)
    products = ProductsOfChange(torch.bfloat16)
    with products.of_clean_run():
        few_rows.linear(clean, weight)
    with products.of_variants(None):
        got = few_rows.linear(changed, weight)
    change = (changed - clean).bfloat16() @ weight.bfloat16().T
    torch.testing.assert_close(got, clean @ weight.T + change, atol=1e-5, rtol=0)
    assert (got - changed @ weight.T).abs().max() > 1e-3


@EVERY_ARCHITECTURE
def test_generating_with_a_cache_is_what_it_is_without(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(architecture)
    tokens = torch.randint(0, model.cfg.d_vocab, (3, 6), generator=torch.Generator().manual_seed(0))
    fast = model.generate(tokens, 5, do_sample=False, stop_at_eos=False, verbose=False)
    monkeypatch.setattr(few_rows, "FEW", 0)
    plain = model.generate(tokens, 5, do_sample=False, stop_at_eos=False, use_past_kv_cache=False, verbose=False)
    assert torch.equal(fast, plain)
