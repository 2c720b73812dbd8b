"""Operators of torch: each has the right shapes, gradients and traces, and its kernel, run on the CPU, gives what it defines."""

from __future__ import annotations

import codecs
import locale
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects, mask_effects
from hooked_moe.counterfactuals.readouts import LossAfter
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.kernels import dispatch, prefix_attention, routing, swiglu, target_loss, weighted_sum
from hooked_moe.kernels.cuda import nvrtc
from hooked_moe.kernels.routing import group_by_expert
from tests.conftest import EVERY_ARCHITECTURE
from tests.kernels.cuda import host

OPERATORS = torch.ops.hooked_moe
LAUNCHES: dict[str, Callable[..., Any]] = {
    "masked_combine": weighted_sum._launch,
    "gather_rows": swiglu._launch_gather_rows,
    "swiglu": swiglu._launch_swiglu,
    "clamped_swiglu": swiglu._launch_swiglu,
    "route": routing._launch_route,
    "group_by_expert": routing._launch_group_by_expert,
    "prefix_attention": prefix_attention._launch,
    "target_loss": target_loss._launch,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, in float32: optional ones given and left out."""
    place = torch.randperm(12, generator=torch.Generator().manual_seed(2)).view(4, 3)
    keep = torch.ones(5, 12, dtype=torch.bool)
    keep[:, 2] = False
    q, own_k, own_v = draw(3, 2, 6, 4, 6), draw(3, 2, 6, 2, 6, seed=1), draw(3, 2, 6, 2, 4, seed=2)
    attention = q, own_k, own_v, draw(2, 7, 2, 6, seed=3), draw(2, 7, 2, 4, seed=4)
    return {
        "masked_combine": [
            (draw(12, 5), place, draw(2, 4, 3), draw(4, 5)),
            (draw(12, 5), place, draw(1, 4, 3), None),
            (draw(9, 5), integers(9, 4, 3), draw(0, 4, 3), None),
        ],
        "gather_rows": [(draw(4, 5), place.flatten().argsort(), place)],
        "swiglu": [(draw(6, 8),), (draw(0, 8),)],
        "clamped_swiglu": [(draw(6, 8), 0.7, 1.702)],
        "route": [
            (draw(5, 12), None, None, 3, False, 1.0, 1, 1, False, False),
            (draw(5, 12), None, None, 3, True, 1.5, 3, 2, False, False),
            (draw(5, 12), keep, None, 3, True, 1.0, 1, 1, False, False),
            (draw(5, 12), keep, draw(12, seed=1), 3, True, 2.5, 4, 2, True, True),
        ],
        "group_by_expert": [(integers(7, 40, 3), 7), (integers(7, 0, 3), 7)],
        "prefix_attention": [
            (*attention, None, 1, 0.3, None, None),
            (*attention, torch.tensor([[0, 3, 7], [2, 4, 1]]), 2, 0.3, None, None),
            (*attention, None, 1, 0.3, draw(4, seed=5), 3),
            (*attention, torch.tensor([[0, 3, 7], [2, 4, 1]]), 2, 0.3, draw(4, seed=5), 2),
        ],
        "target_loss": [(draw(5, 6), draw(11, 6, seed=1), integers(11, 5)), (draw(0, 6), draw(11, 6), integers(11, 0))],
    }


CASES = [(name, number) for name, some in samples().items() for number in range(len(some))]
EVERY_CASE = pytest.mark.parametrize(("name", "number"), CASES)
WITH_GRADIENTS = [case for case in CASES if case not in (("masked_combine", 2), ("target_loss", 1), ("swiglu", 1))]
WITH_GRADIENTS = [case for case in WITH_GRADIENTS if case[0] != "group_by_expert"]


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def mapped(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def differentiable(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return mapped(arguments, lambda x: x.to(dtype).requires_grad_())


@pytest.mark.skipif(
    codecs.lookup(locale.getencoding()).name == "ascii", reason="torch cannot read its own templates in this locale"
)
@EVERY_CASE
def test_torch_finds_schema_shapes_gradient_and_trace_in_order(name: str, number: int) -> None:
    trace = "static" if name == "prefix_attention" else "dynamic"  # the latter takes it half a minute
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", f"test_aot_dispatch_{trace}")
    arguments = differentiable(samples()[name][number], torch.float32)
    assert opcheck(getattr(OPERATORS, name), arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize(("name", "number"), WITH_GRADIENTS)
def test_gradients_are_those_of_differences(name: str, number: int) -> None:
    inputs = differentiable(samples()[name][number], torch.float64)

    def real_outputs(*given: Any) -> tuple[Tensor, ...]:
        return tuple(x for x in as_tuple(getattr(OPERATORS, name)(*given)) if x.is_floating_point())

    assert torch.autograd.gradcheck(real_outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", dispatch.DTYPES, ids=str)
@EVERY_CASE
def test_what_a_gpu_is_told_to_run_gives_what_the_operator_defines(
    name: str, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch's own code: contiguity, sizes, order of arguments; the kernel on the CPU."""
    monkeypatch.setattr(nvrtc, "run", host.run)
    arguments = samples()[name][number]
    given = arguments if name == "route" else mapped(arguments, lambda x: x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 or name == "route" else 2e-2
    expected = as_tuple(getattr(OPERATORS, name)(*given))
    for got, wanted in zip(as_tuple(LAUNCHES[name](*given)), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def test_float32_states_meet_bfloat16_weights_without_being_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "run", host.run)
    x, weight, targets = draw(9, 24), draw(50, 24, seed=1).bfloat16(), integers(50, 9)
    targets[3] = -1
    expected = OPERATORS.target_loss(x, weight, targets)
    assert [values.isnan().nonzero().flatten().tolist() for values in expected] == [[3], []]
    torch.testing.assert_close(LAUNCHES["target_loss"](x, weight, targets), expected, atol=1e-4, rtol=1e-4, equal_nan=True)


Way = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["by definition", "by kernels on the CPU"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """The way that a GPU takes, while a context lasts."""
    if request.param == "by kernels on the CPU":
        monkeypatch.setattr(nvrtc, "run", host.run)
        for name, launch in LAUNCHES.items():
            module = next(m for m in (weighted_sum, swiglu, routing, prefix_attention, target_loss) if hasattr(m, f"_{name}"))
            monkeypatch.setattr(module, f"_{name}", launch)
    return lambda: dispatch.using("reference")


@EVERY_ARCHITECTURE
def test_a_forward_pass_is_that_of_torch(model: HookedMoE, tokens: Tensor, architecture: str, operators: Way) -> None:
    layer = model.cfg.moe_layers[0]
    masks = [None, *(ExpertMask.ablate([(layer, 0, 3, 1), (layer, 1, None, 2)], removal) for removal in REMOVALS)]
    with torch.no_grad():
        expected = [model(tokens, expert_mask=mask) for mask in masks]
    with torch.no_grad(), operators():
        for mask, logits in zip(masks, expected, strict=True):
            torch.testing.assert_close(model(tokens, expert_mask=mask), logits, atol=1e-4, rtol=1e-4)


REMOVALS: list[Any] = ["zero", "renormalize", "reroute"]


@EVERY_ARCHITECTURE
def test_the_audit_is_that_of_torch(model: HookedMoE, tokens: Tensor, architecture: str, operators: Way) -> None:
    def measured() -> list[Any]:
        some = {"positions": [0, 3, 7], "readouts": [LossAfter(2)]}
        keep = torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(0))
        return [
            expert_effects(model, tokens),
            expert_effects(model, tokens, removal="renormalize", **some),
            mask_effects(model, tokens, {model.cfg.moe_layers[0]: keep}),
        ]

    expected = measured()
    with operators():
        found = measured()
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.delta_loss, wanted.delta_loss, atol=1e-5, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(got.baseline_loss, wanted.baseline_loss, atol=1e-5, rtol=1e-5, equal_nan=True)
        for name, values in wanted.readouts.items():
            torch.testing.assert_close(got.readouts[name], values, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_in_bfloat16_a_mask_that_removes_nothing_changes_no_bit(
    make_model: Callable[..., HookedMoE], tokens: Tensor, operators: Way
) -> None:
    """Experts of the clean run and of its variants are added up and rounded alike. In the last layer, for attention is not."""
    model = make_model("qwen", dtype=torch.bfloat16)
    layer = model.cfg.moe_layers[-1]
    with operators():
        effects = mask_effects(model, tokens, {layer: torch.ones(1, 1, 1, 6, dtype=torch.bool)})
    assert not effects.delta_loss[..., :-1].any()


class Waits(TorchDispatchMode):
    """Notes the operations whose results a host would wait for a GPU to know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        waiting = ("nonzero", "_local_scalar_dense", "bincount", "unique", "masked_select", "aten.equal", "is_nonzero")
        if by_mask or any(part in name for part in waiting):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_number_of_waits_does_not_grow_with_layers_or_variants(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    found = []
    for layers in (2, 4):
        model = make_model(n_layers=layers)
        with dispatch.using("reference"), Waits() as waits:
            expert_effects(model, tokens)
        found.append(waits.found)
    assert len(found[0]) == len(found[1]), found


def test_rows_are_grouped_by_torch_as_the_operator_defines() -> None:
    indices = integers(7, 30, 3)
    for got, wanted in zip(group_by_expert(indices, 7), OPERATORS.group_by_expert(indices, 7), strict=True):
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype


def test_torch_compile_takes_an_operator_whole() -> None:
    rows, place, weights, base = samples()["masked_combine"][0]
    place = place.view(2, 2, 3)
    weights, base = weights.view(2, 2, 2, 3), base.view(2, 2, 5)
    with dispatch.using("reference"):
        expected = weighted_sum.masked_combine(rows, place, weights, base)
    compiled = torch.compile(OPERATORS.masked_combine, fullgraph=True, backend="aot_eager")
    flat = compiled(rows, place.flatten(0, 1), weights.flatten(1, 2), base.flatten(0, 1))
    torch.testing.assert_close(flat.view_as(expected), expected)
