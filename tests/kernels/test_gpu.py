"""What only a GPU can show: kernels as NVRTC makes them, the audit by them, no waiting, graphs. `make gpu` runs these."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block, clean_block, rotation_of
from hooked_moe.counterfactuals.engine.fan_out import advance
from hooked_moe.counterfactuals.engine.windows import Windows
from hooked_moe.counterfactuals.removals import Zero, each_slot_removed
from hooked_moe.kernels import dispatch
from hooked_moe.kernels.cuda import nvrtc
from tests.conftest import EVERY_ARCHITECTURE
from tests.kernels.test_kernel_operators import EVERY_CASE, LAUNCHES, OPERATORS, as_tuple, mapped, samples

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def kernels_that_run() -> Iterator[None]:
    """A kernel that cannot run fails the test: a warning that torch runs instead is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", dispatch.KernelWarning)
        yield


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(GPU) if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.parametrize("dtype", dispatch.DTYPES, ids=str)
@EVERY_CASE
def test_a_kernel_gives_what_its_definition_does(name: str, number: int, dtype: torch.dtype) -> None:
    arguments = samples()[name][number]
    given = arguments if name == "route" else mapped(arguments, lambda x: x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 or name == "route" else 2e-2
    expected = as_tuple(getattr(OPERATORS, name)(*given))  # on the CPU
    for got, wanted in zip(as_tuple(LAUNCHES[name](*on_gpu(given))), expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, atol=tolerance, rtol=tolerance)


def test_the_machine_code_of_every_kernel_is_kept() -> None:
    LAUNCHES["swiglu"](torch.ones(2, 8, device=GPU))
    directory = nvrtc.cache_directory()
    assert directory is not None
    assert any(path.name.startswith("swiglu-sm_") for path in directory.iterdir())


@EVERY_ARCHITECTURE
def test_the_audit_on_a_gpu_is_that_on_a_cpu(architecture: str, make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    model = make_model(architecture)
    expected = expert_effects(model, tokens)
    found = expert_effects(model.to(GPU), tokens.to(GPU))
    assert torch.equal(found.expert_index.cpu(), expected.expert_index)
    torch.testing.assert_close(found.delta_loss.cpu(), expected.delta_loss, atol=2e-5, rtol=1e-3, equal_nan=True)


@torch.inference_mode()
def test_variants_go_through_a_block_without_waiting_for_the_gpu(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    """But for the grouped products: of bfloat16, which torch has a kernel for."""
    model = make_model(d_model=64, d_head=16, d_expert=32, dtype=torch.bfloat16).to(GPU)
    rotate = rotation_of(model, tokens.shape[1])
    resid = model.embed(tokens.to(GPU))

    def step() -> None:
        clean: CleanBlock = clean_block(model.blocks[0], 0, resid, rotate)
        experts = as_expert_block(clean)
        variants = Zero().without(experts, each_slot_removed(experts))
        advance(variants, clean_block(model.blocks[1], 1, clean.resid_post, rotate), rotate, Windows(None), 4096)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_are_captured_in_a_cuda_graph() -> None:
    arguments = on_gpu(samples()["masked_combine"][0])
    expected = OPERATORS.masked_combine(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPERATORS.masked_combine(*arguments)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)


def test_training_on_a_gpu_has_the_gradients_of_a_cpu(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    model = make_model("qwen")
    model(tokens, return_type="loss").backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    other = make_model("qwen").to(GPU)
    other(tokens.to(GPU), return_type="loss").backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
