"""torch.compile on a CPU, in float32 too: the same losses and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch cannot trace, and runs as it is
        yield
    torch.compiler.reset()


def both(model: HookedMoE, backend: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a model and of the same one compiled, with gradients in their graphs."""
    return model(tokens, return_type="loss"), torch.compile(model, backend=backend)(tokens, return_type="loss")


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_model_computes_the_same(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    ours, compiled = both(make_model(n_layers=1, d_expert=16), "eager", tokens)  # of whole 16 bytes, for torch's grouped product
    assert torch.equal(ours, compiled)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["olmoe", "qwen", "deepseek"])
def test_gradients_and_longer_texts_too(
    architecture: str, dtype: torch.dtype, backend: str, make_model: Callable[..., HookedMoE]
) -> None:
    model = make_model(architecture, dtype=dtype, d_expert=16)
    for length in (10, 64):
        tokens = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))
        ours, compiled = both(model, backend, tokens)
        torch.testing.assert_close(compiled, ours, atol=1e-6, rtol=0)
        expected = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)
        for got, want in zip(torch.autograd.grad(compiled, list(model.parameters()), allow_unused=True), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
