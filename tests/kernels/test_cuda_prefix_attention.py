"""The CUDA kernel of prefix attention, on the CPU, against the definition of attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from hooked_moe.kernels.cuda import launches
from tests.kernels.cuda import host


@dataclass(frozen=True)
class Case:
    variants: int = 3
    batch: int = 2
    queries: int = 21
    width: int = 1
    kv_heads: int = 2
    group: int = 2
    head_width: int = 16
    value_width: int = 16
    n_keys: int = 21
    positions: str | None = None
    sink: bool = False
    reach: int = 0


@dataclass(frozen=True)
class Inputs:
    """In the order of the kernel's arguments."""

    q: Tensor
    own_k: Tensor
    own_v: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor | None
    sink: Tensor | None


def drawn(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    own = (case.variants, case.batch, case.queries * case.width)
    positions = None
    if case.positions == "first":
        positions = torch.zeros(case.batch, case.queries, dtype=torch.int64)
    elif case.positions == "random":
        positions = torch.randint(case.n_keys, (case.batch, case.queries), generator=generator)
    return Inputs(
        normal(*own, case.kv_heads * case.group, case.head_width),
        normal(*own, case.kv_heads, case.head_width),
        normal(*own, case.kv_heads, case.value_width),
        normal(case.batch, case.n_keys, case.kv_heads, case.head_width),
        normal(case.batch, case.n_keys, case.kv_heads, case.value_width),
        positions,
        2 * torch.randn(case.kv_heads * case.group, generator=generator) if case.sink else None,
    )


def on_kernel(inputs: Inputs, width: int, scale: float, reach: int = 0, backwards: bool = False) -> Tensor:
    variants, batch, tokens, heads, head_width = inputs.q.shape
    n_keys, kv_heads, value_width = inputs.values.shape[1:]
    sizes = {"variants": variants, "batch": batch, "queries": tokens // width, "width": width}
    sizes |= {"kv_heads": kv_heads, "group": heads // kv_heads}
    launch = launches.prefix_attention(**sizes, head_width=head_width, value_width=value_width, dtype=inputs.q.dtype)
    out = host.empty(variants, batch, tokens, heads, value_width, dtype=inputs.q.dtype)
    tensors = (getattr(inputs, field.name) for field in fields(inputs))
    host.run(launch, out, *tensors, *sizes.values(), n_keys, reach, scale, backwards=backwards)
    return out


def by_definition(inputs: Inputs, width: int, scale: float, reach: int = 0) -> Tensor:
    """Every query with the keys it sees, one at a time."""
    q, own_k, own_v, keys, values = (getattr(inputs, name).double() for name in ("q", "own_k", "own_v", "keys", "values"))
    out = q.new_empty(*q.shape[:-1], values.shape[-1])
    for v, b, token in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        query, window = token // width, slice(token // width * width, token + 1)
        position = query if inputs.positions is None else int(inputs.positions[b, query])
        k, x = (torch.cat((clean[b, :position], own[v, b, window])) for clean, own in ((keys, own_k), (values, own_v)))
        missing = max(0, position - len(keys[b]))  # positions behind the last key, seen by nobody
        last = max(0, reach - missing if token % width + 1 < reach else reach) if reach else len(k)
        k, x = k[-last:].transpose(0, 1), x[-last:].transpose(0, 1)
        k, x = (t.repeat_interleave(q.shape[3] // t.shape[0], dim=0) for t in (k, x))
        scores = (k @ q[v, b, token, :, :, None])[..., 0] * scale
        if inputs.sink is not None:
            scores = torch.cat((scores, inputs.sink.double()[:, None]), dim=-1)
        out[v, b, token] = torch.einsum("hk,hke->he", scores.softmax(-1)[:, : k.shape[1]], x)
    return out


CASES = {
    "one variant, one query": Case(variants=1, batch=1, queries=1, n_keys=1),
    "odd head sizes, values wider than keys": Case(head_width=5, value_width=23, kv_heads=3, group=1),
    "a group of four": Case(group=4, kv_heads=1),
    "many tiles of keys": Case(variants=2, batch=1, queries=150, n_keys=150, kv_heads=1),
    "positions in any order": Case(positions="random", queries=30, n_keys=70),
    "nothing before any query": Case(positions="first"),
    "more queries than keys": Case(queries=40, n_keys=9),
    "windows": Case(width=3, positions="random", queries=9, n_keys=40, group=1),
    "sinks": Case(sink=True),
    "a sliding window over many tiles": Case(variants=2, batch=1, queries=150, n_keys=150, kv_heads=1, reach=37),
    "a sliding window, positions in any order": Case(positions="random", queries=30, n_keys=70, reach=9, sink=True),
    "a sliding window of one": Case(reach=1),
    "windows in a sliding window": Case(width=4, positions="random", queries=9, n_keys=40, group=1, reach=3, sink=True),
    "latent attention, values narrower than keys": Case(
        variants=1, batch=1, queries=20, n_keys=20, head_width=192, value_width=128, kv_heads=1, group=1
    ),
}


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs = drawn(case, dtype)
    scale = 2.0 * case.head_width**-0.5
    out = on_kernel(inputs, case.width, scale, case.reach)
    assert_close_to_definition(out, inputs, case.width, scale, reach=case.reach)


def assert_close_to_definition(
    out: Tensor, inputs: Inputs, width: int, scale: float, tolerance: float = 1e-5, reach: int = 0
) -> None:
    expected = by_definition(inputs, width, scale, reach)
    assert out.shape == expected.shape
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    else:  # rounded once, and so are the weights: each of them, and with the others their sum
        rounding = torch.finfo(out.dtype).eps / 2
        sizes = replace(inputs, own_v=inputs.own_v.abs(), values=inputs.values.abs())
        bound = rounding * (expected.abs() + 2 * by_definition(sizes, width, scale, reach)) + tolerance
        assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_all_the_same_come_out_as_they_are(dtype: torch.dtype) -> None:
    """Weights add up to one, however they were rounded."""
    inputs = drawn(Case(queries=40, n_keys=40), dtype)
    value = torch.tensor(1.7).to(dtype)
    inputs.values.fill_(value)
    inputs.own_v.fill_(value)
    torch.testing.assert_close(on_kernel(inputs, 1, 0.5), inputs.own_v.repeat_interleave(2, dim=3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    case = Case(queries=40, n_keys=40)
    inputs = drawn(case, dtype)
    for scale, tolerance in ((100.0, 1e-3), (1e-6, 1e-5)):  # a score of 1000 is known to 1e-4
        assert_close_to_definition(on_kernel(inputs, 1, scale), inputs, 1, scale, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_key_from_the_position_on_is_looked_at(dtype: torch.dtype) -> None:
    case = Case(queries=5, n_keys=90, positions="random")
    inputs = drawn(case, dtype)
    before = on_kernel(inputs, 1, 0.3)
    latest = int(inputs.positions.max())
    assert latest < case.n_keys
    inputs.keys[:, latest:] = float("nan")
    inputs.values[:, latest:] = float("nan")
    assert torch.equal(on_kernel(inputs, 1, 0.3), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "own_k", "own_v", "keys", "values"])
def test_pointers_off_the_16_bytes_change_no_bit_of_products_by_tiles(name: str, dtype: torch.dtype) -> None:
    inputs = drawn(Case(queries=40, n_keys=40), dtype)
    shifted = replace(inputs, **{name: off_by_one(getattr(inputs, name))})
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "own_k" and dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(on_kernel(shifted, 1, 0.3), on_kernel(inputs, 1, 0.3), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_key_before_the_sliding_window_is_looked_at(dtype: torch.dtype) -> None:
    case = Case(batch=1, queries=5, n_keys=90, positions="random")
    inputs = drawn(case, dtype)
    before = on_kernel(inputs, 1, 0.3, 7)
    first = int(inputs.positions.min()) + 1 - 7
    assert first > 0
    inputs.keys[:, :first] = float("nan")
    inputs.values[:, :first] = float("nan")
    assert torch.equal(on_kernel(inputs, 1, 0.3, 7), before)


def test_a_sink_far_above_all_scores_leaves_nothing_and_one_far_below_everything() -> None:
    inputs = drawn(Case(sink=True), torch.float32)
    for sink, expected in ((500.0, torch.zeros(())), (-500.0, on_kernel(replace(inputs, sink=None), 1, 0.3))):
        torch.testing.assert_close(
            on_kernel(replace(inputs, sink=torch.full((4,), sink)), 1, 0.3), expected.expand(3, 2, 21, 4, 16)
        )


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = drawn(Case(variants=2, batch=1, queries=150, n_keys=150, kv_heads=1), dtype)
    assert torch.equal(on_kernel(inputs, 1, 0.3), on_kernel(inputs, 1, 0.3, backwards=True))


def test_nothing_to_do_is_done() -> None:
    inputs = drawn(Case(variants=0), torch.float32)
    assert on_kernel(inputs, 1, 0.3).shape == (0, 2, 21, 4, 16)


def test_heads_that_do_not_fit_are_refused() -> None:
    sizes = {"variants": 1, "batch": 1, "queries": 1, "width": 1, "kv_heads": 1, "group": 1}
    with pytest.raises(ValueError, match=r"does not take heads of 128 with values of 264 in torch\.bfloat16"):
        launches.prefix_attention(**sizes, head_width=128, value_width=264, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"does not take heads of 576 with values of 256 in torch\.float32"):
        launches.prefix_attention(**sizes, head_width=576, value_width=256, dtype=torch.float32)
