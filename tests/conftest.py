"""Every test runs with the shapes and types of the annotations checked, and on one thread. See `tests.support.type_checks`."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.support import type_checks

# Before the first import of either package. The checks can be switched off while a test runs: see `unchecked`.
os.environ.pop("HOOKED_MOE_KERNELS", None)  # of whoever runs the tests, which choose for themselves
jaxtyping.config.update("jaxtyping_disable", False)  # whatever JAXTYPING_DISABLE says
type_checks.install("hooked_moe", "weights_conversion")

from hooked_moe import HookedMoE, HookedMoEConfig  # noqa: E402
from hooked_moe.config import ClampedSwiGLU, YarnScaling  # noqa: E402
from hooked_moe.report import drawing_process  # noqa: E402

torch.set_num_threads(1)
drawing_process.PROCESSES = 1  # small runs' figures are drawn before another process has started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not go through it again and again, for a tenth of the time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def types_checked_anew() -> None:
    type_checks.begin_test()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Also after a test that had the library share out several threads, which puts back as many as there seemed to be."""
    yield
    torch.set_num_threads(1)


@contextmanager
def without_type_checks() -> Iterator[None]:
    """As users run it. For slow, obvious versions made of many calls like those that a test has checked once."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it, without checks of the annotations: then the library's own errors answer bad input."""
    with without_type_checks():
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Another number of torch's threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "n_key_value_heads": 2,
        "d_head": 8,
        "qk_norm": "full",
        "clip_qkv": 2.5,
        "qkv_bias": True,
        "output_bias": True,
    },
    "qwen": {
        "n_key_value_heads": 2,
        "d_head": 8,
        "qk_norm": "head",
        "qkv_bias": True,
        "norm_topk_prob": True,
        "d_shared": 20,
        "shared_gate": True,
        "dense_layers": (1,),
        "d_mlp": 24,
    },
    "deepseek": {
        "n_key_value_heads": 4,
        "d_head": 14,
        "d_rotary": 8,
        "d_value": 10,
        "kv_lora_rank": 18,
        "q_lora_rank": 16,
        "rotary_interleaved": True,
        "rotary_scaling": YarnScaling(factor=4.0, original_ctx=200, beta_fast=8.0, beta_slow=0.5, mscale=2.0, mscale_all_dim=0.5),
        "n_expert_groups": 3,
        "groups_per_token": 2,
        "routed_scaling_factor": 1.5,
        "d_shared": 20,
        "dense_layers": (0,),
        "d_mlp": 24,
    },
    "glm": {
        "n_key_value_heads": 2,
        "d_head": 8,
        "d_rotary": 4,
        "windowed_layers": (1,),
        "sliding_window": 2,
        "router_score": "sigmoid",
        "selection_bias": True,
        "group_score": "top2",
        "n_expert_groups": 3,
        "groups_per_token": 2,
        "norm_topk_prob": True,
        "d_shared": 20,
        "dense_layers": (0,),
        "d_mlp": 24,
    },
    "gpt-oss": {
        "n_key_value_heads": 2,
        "d_head": 8,
        "qkv_bias": True,
        "output_bias": True,
        "attention_sink": True,
        "windowed_layers": (0,),
        "sliding_window": 4,
        "router_bias": True,
        "norm_topk_prob": True,
        "expert_bias": True,
        "clamped_swiglu": ClampedSwiGLU(limit=0.4, alpha=1.702),
    },
}
"""What the families differ by, at sizes that shapes tell apart; together they have every row of the hook table."""

EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)
"""Of the fixture `model`, for tests that hold for all."""


def random_config(architecture: str = "olmoe", **changes: Any) -> HookedMoEConfig:
    sizes: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 32,
        "d_vocab": 61,
        "n_ctx": 64,
        "n_heads": 4,
        "num_experts": 6,
        "experts_per_token": 3,
        "d_expert": 12,
    }
    return HookedMoEConfig(**(sizes | ARCHITECTURES[architecture] | changes))


def random_model(architecture: str = "olmoe", **changes: Any) -> HookedMoE:
    """A model of three layers with every option that a hook or a mask could trip over, and weights large enough to matter."""
    torch.manual_seed(0)
    model = HookedMoE(random_config(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith(".w") else 0.0, 0.2)
    return model


def swiglu(x: Tensor, w_gate: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """What an expert, the shared experts or a dense MLP make of tokens [..., d_model]."""
    return activated(x @ w_gate.T, x @ w_in.T) @ w_out.T


def activated(gate: Tensor, up: Tensor, clamp: ClampedSwiGLU | None = None) -> Tensor:
    """The activation of experts by its definition."""
    if clamp is None:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (up + 1) * gate * (clamp.alpha * gate).sigmoid()


def expert_output(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What a routed expert makes of tokens [..., d_model], with the biases and the limit that its family has."""
    gate, up = (x @ w.T for w in experts.W_in[expert])
    if experts.b_in is None:
        return activated(gate, up, experts.clamp) @ experts.W_out[expert].T
    b_gate, b_up = experts.b_in[expert]
    return activated(gate + b_gate, up + b_up, experts.clamp) @ experts.W_out[expert].T + experts.b_out[expert]


_shared_model = functools.cache(random_model)


@pytest.fixture
def architecture() -> str:
    return "olmoe"


@pytest.fixture
def model(architecture: str) -> Iterator[HookedMoE]:
    """One model of each architecture for all tests; each has to leave it as it was."""
    shared = _shared_model(architecture)
    before = {name: parameter.clone() for name, parameter in shared.named_parameters()}
    yield shared
    shared.zero_grad()
    left = [name for name, point in shared.hook_dict.items() if point.active]
    shared.reset_hooks(including_permanent=True)
    assert not left, "the test left hooks behind"
    assert all(torch.equal(before[name], parameter) for name, parameter in shared.named_parameters())


@pytest.fixture
def make_model() -> Callable[..., HookedMoE]:
    """A model of its own: an architecture, and changes to its config."""
    return random_model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
