"""The fast forms of attention of variants in torch, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_moe.kernels import prefix_attention as kernel
from hooked_moe.kernels.cpu import prefix_attention as on_cpu


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(queries: int, width: int, dtype: torch.dtype, d_value: int = 8) -> tuple[Tensor, ...]:
    """q, own_k, own_v, keys, values: 3 variants of 2 rows of 9 positions, 4 heads over 2 key/value heads."""
    own = (3, 2, queries * width)
    return (
        draw(*own, 4, 8, seed=0, dtype=dtype),
        draw(*own, 2, 8, seed=1, dtype=dtype),
        draw(*own, 2, d_value, seed=2, dtype=dtype),
        draw(2, 9, 2, 8, seed=3, dtype=dtype),
        draw(2, 9, 2, d_value, seed=4, dtype=dtype),
    )


STARTS = {"everywhere": None, "somewhere": torch.tensor([[0, 3, 9], [5, 0, 1]]), "without a prefix": torch.zeros(2, 3).long()}


SINK = draw(4, seed=6)
LIMITS = {"whole": (None, None), "sink": (SINK, None), "one position": (None, 1), "three": (None, 3), "six and a sink": (SINK, 6)}
"""A sink, and how many positions a token sees."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_by_parts_is_the_definition(
    starts: Tensor | None,
    limits: tuple[Tensor | None, int | None],
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_cpu, "_QUERIES_PER_PART", 4)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for d_value in (5, 8):
        arguments = inputs(9 if starts is None else 3, width, dtype, d_value)
        assert on_cpu.runs_fused(arguments[0], arguments[-1])
        expected = kernel.window_attention_reference(*arguments, starts, width, 0.4, *limits)
        found = on_cpu.by_parts(*arguments, starts, width, 0.4, *limits)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        named = dict(zip(("sink", "sliding_window"), limits, strict=True))
        assert torch.equal(kernel.window_attention(*arguments, starts, width, 0.4, **named), found)


def test_what_hides_keys_takes_little_memory_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so many keys that there is no room for two queries' rows, each goes alone, and nothing has to be hidden from it."""
    q, keys, values = torch.randn(4, 1, 9, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    expected = on_cpu.over_prefix(q, keys, values, None, 0.4, None)
    monkeypatch.setattr(on_cpu, "_MASK_BYTES", 4 * 9 * 4)
    parts = list(on_cpu._parts(None, 9, 9, 4, None, torch.float32))
    assert [mask for _, _, mask in parts] == [None] * 8
    for found, other in zip(on_cpu.over_prefix(q, keys, values, None, 0.4, None), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("width", [1, 4])
def test_the_definition_is_causal_attention_over_the_changed_sequence(
    limits: tuple[Tensor | None, int | None], width: int
) -> None:
    """Written out: each window put in its place, and one row of a softmax over what its token sees."""
    sink, reach = limits
    starts = STARTS["somewhere"]
    q, own_k, own_v, keys, values = inputs(3, width, torch.float64)
    found = kernel.window_attention_reference(q, own_k, own_v, keys, values, starts, width, 0.4, *limits)
    for variant, b, token in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        query, offset = divmod(token, width)
        start, window = int(starts[b, query]), slice(query * width, token + 1)
        k, v = (torch.cat((clean[b, :start], own[variant, b, window])) for clean, own in ((keys, own_k), (values, own_v)))
        assert len(k) == start + offset + 1
        k, v = (x[-reach:] if reach else x for x in (k, v))
        for head in range(4):
            scores = k[:, head // 2] @ q[variant, b, token, head] * 0.4
            if sink is not None:
                scores = torch.cat((scores, sink[head, None].double()))
            expected = scores.softmax(0)[: len(v)] @ v[:, head // 2]
            torch.testing.assert_close(found[variant, b, token, head], expected)


@pytest.mark.parametrize(("dtype", "d_value"), [(torch.float64, 8), (torch.float32, 11)], ids=["float64", "wide values"])
def test_where_there_is_no_fused_kernel_the_definition_runs(dtype: torch.dtype, d_value: int) -> None:
    arguments = inputs(9, 1, dtype, d_value)
    assert torch.equal(
        kernel.window_attention(*arguments, None, 1, 0.4), kernel.window_attention_reference(*arguments, None, 1, 0.4)
    )


@pytest.mark.parametrize(("sink", "reach"), LIMITS.values(), ids=LIMITS)
def test_the_share_of_the_own_position_is_that_of_causal_attention(
    sink: Tensor | None, reach: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, (keys, values) = draw(2, 9, 4, 8, seed=5), inputs(9, 1, torch.float32)[-2:]
    scores = torch.einsum("bqhe,bkhe->bhqk", q, keys.repeat_interleave(2, dim=2)) * 0.4
    seen = torch.ones(9, 9).tril().triu(1 - (reach or 9)).bool()
    scores = scores.masked_fill(~seen, -torch.inf)
    beside = torch.full((2, 4, 9, 1), -torch.inf) if sink is None else sink[:, None, None].expand(2, 4, 9, 1)
    pattern = torch.cat((scores, beside), dim=-1).softmax(-1)
    expected = pattern.diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    torch.testing.assert_close(kernel.own_share(q, keys, values, 0.4, sink, reach), expected)
    monkeypatch.setattr(on_cpu, "_FUSED_DTYPES", ())
    torch.testing.assert_close(kernel.own_share(q, keys, values, 0.4, sink, reach), expected)
