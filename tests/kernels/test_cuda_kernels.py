"""Every CUDA kernel, executed on the CPU with the launch that a GPU gets, against its definition.

Each runs twice, the last block and thread first the second time: a kernel whose result depends on the order lacks a barrier.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe.components.experts import ExpertGroups
from hooked_moe.kernels import routing
from hooked_moe.kernels.cuda import launches
from hooked_moe.kernels.routing import RoutingRule
from tests.kernels.cuda import host

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def run(request: pytest.FixtureRequest) -> Any:
    return functools.partial(host.run, backwards=request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_rounded_once(out: Tensor, exact: Tensor) -> None:
    """Half a unit in the last place of its type from the exact result, but for the float32 in which it was computed."""
    torch.testing.assert_close(out.double(), exact, rtol=max(torch.finfo(out.dtype).eps / 2, 1e-6), atol=3e-6)


def shifted(x: Tensor) -> Tensor:
    """The same values, one element off the 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


# masked_combine ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mask_dtype", "variants", "tokens", "slots", "width"),
    [
        (torch.float32, torch.bool, 3, 5, 2, 12),
        (torch.bfloat16, torch.bool, 8, 7, 8, 40),  # several tokens to a block, the last of them missing
        (torch.bfloat16, torch.bool, 70, 2, 3, 33),  # rows of odd length; more variants than go into a tile
        (torch.float16, torch.float16, 5, 3, 4, 24),
        (torch.float32, torch.float32, 1, 1, 1, 1),
        (torch.bfloat16, torch.float32, 4, 3, 40, 48),  # so many slots that accesses are narrower
        (torch.bfloat16, torch.bool, 2, 2, 2, 3000),  # several blocks to a row
        (torch.float16, torch.bool, 3, 0, 2, 8),
        (torch.float16, torch.bool, 0, 3, 2, 8),
    ],
)
def test_masked_combine_is_the_sum_of_what_each_variant_keeps(
    run: Any, dtype: torch.dtype, mask_dtype: torch.dtype, variants: int, tokens: int, slots: int, width: int
) -> None:
    rows, base = torch.randn(tokens * slots + 3, width).to(dtype), torch.randn(tokens, width).to(dtype)
    place = torch.randperm(len(rows))[: tokens * slots].view(tokens, slots)
    weights = torch.rand(tokens, slots).to(dtype)
    mask = torch.rand(variants, tokens, slots)
    mask = mask < 0.5 if mask_dtype == torch.bool else mask.to(mask_dtype)
    mask[:, ::2] = False  # nothing is kept of every other token
    out = combined(run, rows, place, weights, mask, base)
    kept = mask.double() * weights.double()
    assert_rounded_once(out, base.double() + (kept.unsqueeze(-1) * rows.double()[place]).sum(2))


def combined(run: Any, rows: Tensor, place: Tensor, weights: Tensor | None, mask: Tensor, base: Tensor | None) -> Tensor:
    (variants, tokens, slots), width = mask.shape, rows.shape[1]
    out = host.empty(variants, tokens, width, dtype=rows.dtype)
    launch = launches.masked_combine(
        variants=variants,
        tokens=tokens,
        slots=slots,
        width=width,
        dtype=rows.dtype,
        mask=mask.dtype,
        aligned=launches.rows_are_aligned(rows, base, out),
    )
    run(launch, out, rows, place, weights, mask, base, variants, tokens, width, *mask.stride()[:2])
    return out


def test_masked_combine_broadcasts_masks_without_a_copy(run: Any) -> None:
    rows, place = torch.randn(12, 16), torch.randperm(12).view(4, 3)
    keep = torch.eye(3, dtype=torch.bool).logical_not()[:, None, :].expand(3, 4, 3)  # variant j leaves out slot j
    assert keep.stride(1) == 0
    out = combined(run, rows, place, None, keep, None)
    assert_rounded_once(out, torch.stack([rows.double()[place][:, keep[j, 0]].sum(1) for j in range(3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_combine_takes_pointers_off_the_16_bytes_and_not_a_bit_changes(run: Any, dtype: torch.dtype) -> None:
    rows, place, base = torch.randn(10, 16).to(dtype), torch.randperm(10).view(5, 2), torch.randn(5, 16).to(dtype)
    weights, mask = torch.rand(5, 2).to(dtype), torch.rand(3, 5, 2) < 0.7
    assert not launches.rows_are_aligned(shifted(rows))
    aligned = combined(run, rows, place, weights, mask, base)
    assert torch.equal(combined(run, shifted(rows), place, weights, mask, shifted(base)), aligned)


def test_a_row_is_read_16_bytes_at_a_time_and_tokens_share_a_block_where_rows_are_short() -> None:
    shape = {"variants": 8, "tokens": 1000, "dtype": torch.bfloat16, "mask": torch.bool, "aligned": True}
    olmoe = launches.masked_combine(slots=8, width=2048, **shape)
    assert dict(olmoe.defines)["VECTOR"] == 8
    assert (olmoe.grid, olmoe.block) == ((1000, 1, 1), (256, 1, 1))
    short = launches.masked_combine(slots=8, width=64, **shape)
    assert (short.grid, short.block) == ((32, 1, 1), (8, 32, 1))
    with pytest.raises(ValueError, match="masked_combine takes up to 128 slots, not 129"):
        launches.masked_combine(slots=129, width=64, **shape)


# route -------------------------------------------------------------------------------------------------------------------------


def routed(
    run: Any,
    logits: Tensor,
    rule: RoutingRule,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    indices, weights = host.empty(tokens, rule.slots, dtype=torch.int64), host.empty(tokens, rule.slots, dtype=dtype)
    aligned = launches.rows_are_aligned(logits)
    sizes = {"tokens": tokens, "experts": experts, "slots": rule.slots, "groups": rule.groups}
    launch = launches.route(**sizes, weights=dtype, aligned=aligned)
    kinds = int(rule.score == "sigmoid"), int(rule.group_score == "top2"), int(rule.renormalize)
    run(launch, indices, weights, logits, keep, bias, *sizes.values(), rule.groups_kept, *kinds, float(rule.scale))
    return indices, weights


@pytest.mark.parametrize(
    ("tokens", "experts", "rule", "dtype"),
    [
        (33, 64, RoutingRule(8), torch.float32),
        (33, 64, RoutingRule(8), torch.bfloat16),
        (70, 60, RoutingRule(4, renormalize=True), torch.float16),
        (5, 8, RoutingRule(2, renormalize=True, scale=2.5), torch.float32),
        (1, 1, RoutingRule(1), torch.float32),
        (3, 7, RoutingRule(7, scale=0.5), torch.float32),
        (9, 160, RoutingRule(6, groups=8, groups_kept=3, scale=16.0), torch.float32),
        (40, 6, RoutingRule(3, groups=3, groups_kept=2), torch.float32),
        (6, 301, RoutingRule(10, renormalize=True), torch.float32),
        (2, 1024, RoutingRule(130), torch.float32),
        (0, 64, RoutingRule(8), torch.float32),
        (33, 64, RoutingRule(6, renormalize=True, scale=2.446, score="sigmoid"), torch.float32),
        (9, 256, RoutingRule(8, True, 2.5, groups=8, groups_kept=4, score="sigmoid", group_score="top2"), torch.bfloat16),
        (40, 6, RoutingRule(3, groups=3, groups_kept=2, score="sigmoid", group_score="top2"), torch.float32),
        (7, 60, RoutingRule(4, groups=5, groups_kept=2, group_score="top2"), torch.float32),
    ],
    ids=str,
)
def test_route_is_what_its_definition_says(run: Any, tokens: int, experts: int, rule: RoutingRule, dtype: torch.dtype) -> None:
    logits, some = 3 * torch.randn(tokens, experts), torch.rand(tokens, experts) < 0.8
    bias = torch.randn(experts) - 1.0  # choices of both signs
    for keep, added in ((None, None), (some, None), (None, bias), (some, bias)):
        indices, weights = routed(run, logits, rule, keep, dtype, added)
        expected_weights, expected = routing.route_reference(logits, rule, keep, added)
        kept = expected_weights > 0  # removed experts are all tied, at zero: which of them fill the last slots does not matter
        assert torch.equal(indices[kept], expected[kept])
        assert_rounded_once(weights, expected_weights.double())


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_bias_chooses_and_does_not_weigh(run: Any, sigmoid: bool) -> None:
    logits, bias = torch.randn(20, 12), torch.zeros(12)
    bias[7] = -50.0
    bias[2] = 50.0
    rule = RoutingRule(3, score="sigmoid" if sigmoid else "softmax")
    indices, weights = routed(run, logits, rule, bias=bias)
    assert (indices == 2).any(-1).all()
    assert (indices != 7).all()
    assert (weights.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(weights, routing.score(logits, rule).gather(-1, indices))


@pytest.mark.parametrize("rule", [RoutingRule(5), RoutingRule(3, groups=5, groups_kept=2)], ids=["experts", "groups"])
def test_route_differs_from_its_definition_at_exact_ties_only(run: Any, rule: RoutingRule) -> None:
    """Of equals, `torch.topk` takes what it takes, the kernel the lowest index."""
    tokens, experts = 300, 20
    distinct = torch.rand(tokens, experts).argsort(-1) / 4
    tied = torch.randint(0, 6, (tokens, experts)).float()
    differing = []
    for logits in (distinct, tied):
        indices, _ = routed(run, logits, rule)
        scores = routing.score(logits, rule)
        lowest_index_wins = scores * (1 - 1e-5 * torch.arange(experts))
        assert torch.equal(indices, routing.select(lowest_index_wins, rule))
        differing.append(int((indices != routing.select(scores, rule)).any(-1).sum()))
    assert differing[0] == 0
    assert 0 < differing[1] <= tokens


@pytest.mark.parametrize("experts", [5, 64, 130])
def test_of_equally_probable_experts_the_lowest_index_comes_first(run: Any, experts: int) -> None:
    logits = torch.randint(0, 3, (50, experts)).float()
    logits[0] = 0.0
    indices, _ = routed(run, logits, RoutingRule(5))
    assert torch.equal(indices, stable_top(logits, 5))
    assert indices[0].tolist() == [0, 1, 2, 3, 4]


def stable_top(probabilities: Tensor, slots: int) -> Tensor:
    """The most probable; of equals, the lowest index first."""
    return probabilities.sort(dim=-1, descending=True, stable=True).indices[:, :slots]


def test_groups_that_are_equally_probable_are_taken_from_the_first(run: Any) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.5]])
    indices, _ = routed(run, logits, RoutingRule(3, groups=4, groups_kept=2))
    assert indices.tolist() == [[1, 3, 0]]


def test_experts_of_other_groups_come_last_where_a_tokens_own_groups_are_too_small(run: Any) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    indices, weights = routed(run, logits, RoutingRule(4, groups=2, groups_kept=1))
    assert indices.tolist() == [[1, 0, 2, 3]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(-1, indices))


def test_not_a_number_stays_in_its_row_and_routes_to_experts_that_exist(run: Any) -> None:
    logits = torch.randn(4, 12)
    logits[1, [3, 7]] = torch.tensor([0x7FC00001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # two that differ in bits
    logits[2] = float("-inf")
    logits[3, :10] = float("-inf")
    indices, weights = routed(run, logits, RoutingRule(3))
    good = torch.tensor([0, 3])
    assert torch.equal(indices[good], stable_top(logits[good].softmax(-1), 3))
    torch.testing.assert_close(weights[good], logits[good].softmax(-1).gather(-1, indices[good]))
    assert weights[1:3].isnan().all()
    assert indices[1:3].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_token_whose_experts_are_all_removed_weighs_nothing(run: Any, renormalize: bool) -> None:
    none = torch.zeros(2, 9, dtype=torch.bool)
    indices, weights = routed(run, torch.randn(2, 9), RoutingRule(4, renormalize=renormalize), none)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2
    assert weights.eq(0).all()


def test_route_does_not_need_aligned_logits(run: Any) -> None:
    logits = torch.randn(10, 64)
    for ours, theirs in zip(routed(run, logits, RoutingRule(8)), routed(run, shifted(logits), RoutingRule(8)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from 8 \(one for each slot\) to 1024 experts, not 1025"):
        launches.route(tokens=1, experts=1025, slots=8, groups=1, weights=torch.float32, aligned=False)
    with pytest.raises(ValueError, match=r"sorting takes from 1 to 6144 experts, not 6145"):
        launches.group_count(entries=1, experts=6145)
    with pytest.raises(ValueError, match="sort fewer than 2147483648 at once"):
        launches.group_count(entries=2**31, experts=8)


# group, gather_rows, swiglu ----------------------------------------------------------------------------------------------------


def grouped(run: Any, indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = indices.flatten()
    count = launches.group_count(entries=len(flat), experts=experts)
    parts = count.grid[0]
    counts, totals = host.empty(experts, parts, dtype=torch.int32), host.empty(experts, dtype=torch.int32)
    order, place = host.empty(len(flat), dtype=torch.int64), host.empty(len(flat), dtype=torch.int64)
    ends = host.empty(experts, dtype=torch.int32)
    run(count, counts, flat, len(flat), experts)
    run(launches.group_scan(experts=experts), counts, totals, parts)
    scatter = launches.group_scatter(entries=len(flat), experts=experts)
    run(scatter, order, place, ends, flat, counts, totals, len(flat), experts)
    return order, place.view(indices.shape), ends


@pytest.mark.parametrize(
    ("tokens", "slots", "experts"),
    [(1, 1, 1), (5, 2, 4), (0, 8, 64), (700, 8, 64), (300, 3, 7), (40, 4, 300), (30, 2, 2000), (1000, 2, 5)],
)
def test_rows_are_sorted_as_by_expert_groups(
    run: Any, tokens: int, slots: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "MOST_PARTS", 5)  # where there are more rows, a part has more
    used = torch.randperm(experts)[: max(1, experts // 2)]  # the others are empty
    indices = used[(torch.rand(1, tokens, slots) ** 3 * len(used)).long()]  # some have many
    groups = ExpertGroups(indices, experts)
    order, place, ends = grouped(run, indices, experts)
    assert torch.equal(order, groups.order)
    assert torch.equal(place, groups.place)
    assert torch.equal(ends, groups.ends)


@pytest.mark.parametrize("expert", [-1, 4, 2**33])
def test_an_expert_that_does_not_exist_stops_the_kernel(run: Any, expert: int) -> None:
    with pytest.raises(host.KernelError, match=r"group_count: thread 2 of block \(0, 0, 0\) is trapped"):
        grouped(run, torch.tensor([0, 3, expert]), 4)


@pytest.mark.parametrize("width", [1, 24, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_gets_a_copy_of_its_tokens(run: Any, dtype: torch.dtype, width: int) -> None:
    tokens, slots, experts = 13, 3, 5
    x = torch.randn(tokens, width + 8).to(dtype)[:, :width]  # rows of something wider
    groups = ExpertGroups(torch.rand(1, tokens, experts).argsort(-1)[..., :slots], experts)
    out = host.empty(tokens * slots, width, dtype=dtype)
    launch = launches.gather_rows(tokens=tokens, width=width, dtype=dtype, aligned=launches.rows_are_aligned(x, out))
    run(launch, out, x, groups.place, tokens, slots, width, x.stride(0))
    assert torch.equal(out, groups.gather(x[None]))


@pytest.mark.parametrize(("rows", "width"), [(5, 12), (3, 1024), (2, 33), (1, 1), (0, 8)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_is_rounded_once(run: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    both = (4 * torch.randn(rows, 2 * width)).to(dtype)
    both[:1, :1] = -300.0  # exp overflows
    out = host.empty(rows, width, dtype=dtype)
    launch = launches.swiglu(rows=rows, width=width, dtype=dtype, aligned=launches.rows_are_aligned(both[:, width:], out))
    run(launch, out, both, rows, width, 2 * width)
    gate, up = both.double().chunk(2, dim=-1)
    assert_rounded_once(out, F.silu(gate) * up)


@pytest.mark.parametrize("dtype", FLOATS)
def test_clamped_swiglu_is_rounded_once(run: Any, dtype: torch.dtype) -> None:
    both = (3 * torch.randn(5, 32)).to(dtype)
    both[0, [0, 1, 16, 17]] = torch.tensor([-300.0, 300.0, -300.0, 300.0]).to(dtype)
    both[1, [0, 17]] = float("nan")
    out = host.empty(5, 16, dtype=dtype)
    run(launches.swiglu(rows=5, width=16, dtype=dtype, aligned=True, clamped=True), out, both, 5, 16, 32, 2.0, 1.702)
    gate, up = both.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    exact = (up + 1) * gate * (1.702 * gate).sigmoid()
    assert torch.equal(out.isnan(), exact.isnan())
    assert_rounded_once(out.nan_to_num(), exact.nan_to_num())


def test_types_that_kernels_do_not_take_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"CUDA kernels take torch\.float32, torch\.float16, torch\.bfloat16; not torch\.float64"
    ):
        launches.swiglu(rows=1, width=1, dtype=torch.float64, aligned=False)
