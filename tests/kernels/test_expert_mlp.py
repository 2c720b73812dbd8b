"""The experts' MLPs one after another: against their definition in float64, and in one go against stage by stage, to the bit."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.config import ClampedSwiGLU
from hooked_moe.kernels.cpu import expert_mlp as kernel
from hooked_moe.kernels.cpu import few_rows

HALF = torch.bfloat16

experts = st.lists(st.integers(0, 70), min_size=1, max_size=5)
widths = st.sampled_from([(1, 1), (5, 3), (16, 8), (40, 33)])


def drawn(counts: list[int], d_model: int, d_expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Tokens, the token of each row, gate and up projections, down projections, and where each expert's rows end."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(9, d_model, generator=generator).to(dtype)
    token = torch.randint(9, (sum(counts),), generator=generator)
    W_in = torch.randn(len(counts), 2 * d_expert, d_model, generator=generator).div(d_model**0.5).to(dtype)
    W_out = torch.randn(len(counts), d_model, d_expert, generator=generator).div(d_expert**0.5).to(dtype)
    return x, token, W_in, W_out, torch.tensor(counts).cumsum(0).tolist()


def definition(x: Tensor, token: Tensor, W_in: Tensor, W_out: Tensor, ends: list[int]) -> Tensor:
    """Row by row."""
    rows = torch.empty(len(token), x.shape[1], dtype=torch.float64)
    for r, t in enumerate(token.tolist()):
        expert = next(e for e, end in enumerate(ends) if r < end)
        gate, up = (W_in[expert].double() @ x[t].double()).chunk(2)
        rows[r] = W_out[expert].double() @ (F.silu(gate) * up)
    return rows


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 0.01), (HALF, 0.06)]
)
@settings(max_examples=25, deadline=None)
@given(experts, widths)
@example([0, 0], (5, 3))
@example([0, 70, 0, 1], (16, 8))
def test_every_row_is_the_mlp_of_its_expert(
    dtype: torch.dtype, tolerance: float, counts: list[int], width: tuple[int, int]
) -> None:
    *inputs, ends = drawn(counts, *width, dtype)
    rows = kernel.expert_mlp(*inputs, kernel.blocks_of(ends, dtype))
    torch.testing.assert_close(rows.double(), definition(*inputs, ends), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("smallest", [few_rows._LARGE, 1], ids=["few rows as many", "few rows transposed"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, HALF])
@settings(max_examples=25, deadline=None)
@given(experts, widths)
@example([1, 2], (5, 3))
@example([1, 3, 2, 1, 4, 1], (40, 33))
@example([700, 43, 0, 31], (40, 33))
def test_stage_by_stage_gives_the_same_bits(
    dtype: torch.dtype, threads: int, smallest: int, counts: list[int], width: tuple[int, int]
) -> None:
    x, token, W_in, W_out, ends = drawn(counts, *width, dtype)
    blocks = kernel.blocks_of(ends, dtype)
    before, large = torch.get_num_threads(), few_rows._LARGE
    torch.set_num_threads(threads)
    few_rows._LARGE = smallest
    try:
        whole = kernel.expert_mlp(x, token, W_in, W_out, blocks)
        pre = kernel.product_by_block(x[token], W_in, blocks)
        staged = kernel.product_by_block(kernel.swiglu_by_block(pre, blocks), W_out, blocks)
    finally:
        torch.set_num_threads(before)
        few_rows._LARGE = large
    assert torch.equal(whole, staged)


def test_biases_belong_to_the_expert_and_the_gate_may_be_clamped() -> None:
    x, token, W_in, W_out, ends = drawn([3, 0, 5], 16, 8, torch.float64)
    b_in, b_out = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    rows = kernel.expert_mlp(
        x, token, W_in, W_out, kernel.blocks_of(ends, x.dtype), None, b_in, b_out, ClampedSwiGLU(limit=0.5, alpha=2.0)
    )
    for r, expert in enumerate([0, 0, 0, 2, 2, 2, 2, 2]):
        gate, up = (W_in[expert] @ x[token[r]] + b_in[expert]).chunk(2)
        g, u = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
        torch.testing.assert_close(rows[r], W_out[expert] @ ((u + 1) * g * (2 * g).sigmoid()) + b_out[expert])


def test_scratch_is_used_again_and_grows() -> None:
    scratch = kernel.Scratch()
    first = scratch.matrix(3, 4, like=torch.empty(0))
    again = scratch.matrix(2, 5, like=torch.empty(0))
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (2, 5)
    assert scratch.matrix(4, 4, like=torch.empty(0, dtype=HALF)).dtype == HALF
    assert scratch.matrix(40, 40, like=torch.empty(0)).shape == (40, 40)
    with torch.inference_mode():
        inside = kernel.Scratch().matrix(1, 1, like=torch.empty(0))
    inside.zero_()


def test_a_thread_has_its_own_scratch() -> None:
    scratch = kernel.Scratch()
    mine = scratch.matrix(2, 2, like=torch.empty(0)).fill_(1.0)
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(lambda: scratch.matrix(2, 2, like=torch.empty(0)).fill_(2.0)).result()
    assert mine.data_ptr() != theirs.data_ptr()
    assert mine.eq(1).all()


@settings(max_examples=100, deadline=None)
@given(experts, st.sampled_from([torch.float32, HALF]))
def test_the_last_block_over_a_row_is_that_of_its_expert(counts: list[int], dtype: torch.dtype) -> None:
    ends = torch.tensor(counts).cumsum(0).tolist()
    owner = torch.full((sum(counts) + kernel.ROW_MULTIPLE,), -1)
    for expert, rows in kernel.blocks_of(ends, dtype):
        assert rows.stop <= len(owner)
        owner[rows] = expert
    assert torch.equal(owner[: sum(counts)], torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))


def test_half_precision_meets_few_numbers_of_rows() -> None:
    sizes = {rows.stop - rows.start for n in range(1, 500) for _, rows in kernel.blocks_of([n], HALF)}
    assert len(sizes) <= kernel.ROW_MULTIPLE // 2 + 500 // kernel.ROW_MULTIPLE + 1
    assert {rows.stop for n in range(1, 500) for _, rows in kernel.blocks_of([n], torch.float32)} == set(range(1, 500))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("worth", [0.0, math.inf], ids=["by block", "grouped"])
@pytest.mark.parametrize("width", [(64, 48), (31, 13)], ids=["aligned rows", "odd widths"])
@pytest.mark.parametrize("architecture", ["olmoe", "gpt-oss"])
@torch.no_grad()
def test_looking_into_the_experts_changes_no_bit(
    architecture: str,
    dtype: torch.dtype,
    worth: float,
    width: tuple[int, int],
    make_model: Callable[..., HookedMoE],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "MIN_FLOPS_PER_EXPERT", worth)
    options: dict[str, Any] = {"d_model": width[0], "d_expert": width[1], "n_ctx": 300, "dtype": dtype}
    model = make_model(architecture, **options)
    tokens = torch.randint(model.cfg.d_vocab, (2, 300))
    logits = model(tokens)
    names = [name for name in model.hook_dict if "expert" in name]
    assert torch.equal(model.run_with_cache(tokens, names_filter=names)[0], logits)
    unchanged = [(name, lambda activation, hook: activation.clone()) for name in names]
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=unchanged), logits)
