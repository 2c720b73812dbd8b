"""Every test runs with the shapes and types of the annotations checked, and on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

# Before the first import of either package. The checks can be switched off while a test runs: see `unchecked`.
jaxtyping.install_import_hook(["hooked_moe", "weights_conversion"], "beartype.beartype")

from hooked_moe import HookedMoE, HookedMoEConfig  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it, without checks of the annotations: then the library's own errors answer bad input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_model(**changes: Any) -> HookedMoE:
    """A model of three layers with every option that a hook or a mask could trip over, and weights large enough to matter."""
    options: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 32,
        "d_vocab": 61,
        "n_ctx": 64,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_head": 8,
        "qk_norm": "full",
        "clip_qkv": 2.5,
        "qkv_bias": True,
        "output_bias": True,
        "num_experts": 6,
        "experts_per_token": 3,
        "d_expert": 12,
    }
    torch.manual_seed(0)
    model = HookedMoE(HookedMoEConfig(**(options | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith(".w") else 0.0, 0.2)
    return model


@pytest.fixture(scope="session")
def _shared_model() -> HookedMoE:
    return random_model()


@pytest.fixture
def model(_shared_model: HookedMoE) -> Iterator[HookedMoE]:
    """One model for all tests; each has to leave it as it was."""
    before = {name: parameter.clone() for name, parameter in _shared_model.named_parameters()}
    yield _shared_model
    _shared_model.zero_grad()
    left = [name for name, point in _shared_model.hook_dict.items() if point.active]
    _shared_model.reset_hooks(including_permanent=True)
    assert not left, "the test left hooks behind"
    assert all(torch.equal(before[name], parameter) for name, parameter in _shared_model.named_parameters())


@pytest.fixture
def make_model() -> Callable[..., HookedMoE]:
    """A model of its own, with changes to the config."""
    return random_model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
