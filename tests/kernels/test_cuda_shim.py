"""The CPU that plays a CUDA device in the tests of kernels: what it computes, and what it does not let pass."""

from __future__ import annotations

import pytest
import torch

from hooked_moe.kernels.cuda.launches import SCALARS, Launch
from tests.kernels.cuda import host

HALF = [torch.float16, torch.bfloat16]


def probe(name: str, *, blocks: int = 1, threads: int = 32, shared_bytes: int = 0, dtype: torch.dtype = torch.float16) -> Launch:
    defines = (("SCALAR", SCALARS[dtype]),)
    return Launch(name, str(host.HERE / "probes.cu"), defines, (blocks, 1, 1), (threads, 1, 1), shared_bytes)


@pytest.mark.parametrize("dtype", HALF)
def test_halves_are_rounded_as_by_torch(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2**32, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.uint32)
    ties = torch.arange(2**16, dtype=torch.int64) << 16 | torch.tensor([0, 0x8000, 0x7FFF, 0x1000])[:, None]
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    x = torch.cat((bits.view(torch.float32), ties.flatten().to(torch.uint32).view(torch.float32), halves))
    to, back = host.empty(len(x), dtype=dtype), host.empty(len(x), dtype=torch.float32)
    host.run(probe("convert", dtype=dtype), to, back, x, len(x))
    torch.testing.assert_close(to, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, to.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_fragments_lie_as_ptx_says_and_multiply(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = host.empty(16, 8, dtype=torch.float32)
    host.run(probe("multiply", dtype=dtype), d, a, b)
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
def test_lanes_hear_each_other_even_on_different_ways(backwards: bool) -> None:
    out = host.empty(5, 32, dtype=torch.int32)
    host.run(probe("talk"), out, backwards=backwards)
    assert out[0].tolist() == [sum(range(16))] * 16 + [19] * 16
    assert out[1].tolist() == [torch.tensor(sum(1 << i for i in range(0, 32, 3)), dtype=torch.int32).item()] * 32
    same = [sum(1 << other for other in range(32) if other % 5 == lane % 5) for lane in range(32)]
    assert out[2].tolist() == torch.tensor(same).to(torch.int32).tolist()
    assert out[3].tolist() == [0, 1, *range(30)]
    assert out[4].tolist() == [lane if lane % 8 > 5 else lane + 2 for lane in range(32)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("with_barrier", [0, 1])
def test_a_missing_barrier_shows(with_barrier: int, backwards: bool) -> None:
    x = torch.arange(3 * 96, dtype=torch.int32)
    out = host.empty(*x.shape, dtype=torch.int32)
    host.run(probe("reverse", blocks=3, threads=96, shared_bytes=4 * 96), out, x, with_barrier, backwards=backwards)
    assert torch.equal(out, x.view(3, 96).flip(1).flatten()) == bool(with_barrier)


@pytest.mark.parametrize("pending", [0, 1])
def test_asynchronous_copies_arrive_when_they_are_waited_for(pending: int) -> None:
    x = torch.arange(8 * 32, dtype=torch.int32)
    out = host.empty(*x.shape, dtype=torch.int32)
    host.run(probe("copy", shared_bytes=4 * len(x)), out, x, pending)
    arrived = out.view(-1, 2, 4) == x.view(-1, 2, 4)
    assert arrived[:, 0].all()
    assert arrived[:, 1].all() == (not pending)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_for_some", r"thread 40 of block \(0, 0, 0\) has returned, but thread 0 .* waits at __syncthreads"),
        ("shuffle_for_some", r"thread 32 of block \(0, 0, 0\) waits for lanes of its warp that never come"),
    ],
)
def test_who_waits_for_what_never_comes_is_told(kernel: str, message: str) -> None:
    with pytest.raises(host.KernelError, match=message):
        host.run(probe(kernel, threads=64))
    test_a_missing_barrier_shows(1, False)  # and the next kernel is none the worse
