"""The fast forms of attention of variants in torch, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_moe.kernels import prefix_attention as kernel


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("d_value", [5, 8])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_by_parts_is_the_definition(starts: Tensor | None, d_value: int, width: int, dtype: torch.dtype) -> None:
    arguments = inputs(9 if starts is None else 3, width, dtype, d_value)
    assert kernel._runs_fused(arguments[0], arguments[-1])
    expected = kernel.window_attention_reference(*arguments, starts, width, 0.4)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(kernel._by_parts(*arguments, starts, width, 0.4), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(kernel.window_attention(*arguments, starts, width, 0.4), kernel._by_parts(*arguments, starts, width, 0.4))


@pytest.mark.parametrize(("dtype", "d_value"), [(torch.float64, 8), (torch.float32, 11)], ids=["float64", "wide values"])
def test_where_there_is_no_fused_kernel_the_definition_runs(dtype: torch.dtype, d_value: int) -> None:
    arguments = inputs(9, 1, dtype, d_value)
    assert torch.equal(
        kernel.window_attention(*arguments, None, 1, 0.4), kernel.window_attention_reference(*arguments, None, 1, 0.4)
    )


def test_the_share_of_the_own_position_is_that_of_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, (keys, values) = draw(2, 9, 4, 8, seed=5), inputs(9, 1, torch.float32)[-2:]
    scores = torch.einsum("bqhe,bkhe->bhqk", q, keys.repeat_interleave(2, dim=2)) * 0.4
    pattern = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    expected = pattern.diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    torch.testing.assert_close(kernel.own_share(q, keys, values, 0.4), expected)
    monkeypatch.setattr(kernel, "_FUSED_DTYPES", ())
    torch.testing.assert_close(kernel.own_share(q, keys, values, 0.4), expected)


@pytest.mark.parametrize("option", [{"sink": torch.zeros(4)}, {"sliding_window": 128}], ids=["sink", "window"])
def test_sinks_and_sliding_windows_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sinks and sliding windows are not implemented yet"):
        kernel.window_attention(*inputs(9, 1, torch.float32), None, 1, 0.4, **option)
