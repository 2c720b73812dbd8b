"""Every CUDA kernel built by NVIDIA's compiler, where there is one; and run under the sanitizers of the host's."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooked_moe.kernels.cuda import launches
from hooked_moe.kernels.cuda.launches import SOURCES, Launch
from tests.kernels.cuda import host

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def combine(dtype: torch.dtype, slots: int) -> Launch:
    return launches.masked_combine(
        variants=8, tokens=512, slots=slots, width=2048, dtype=dtype, mask=torch.bool, aligned=slots <= 64
    )


def route(experts: int) -> Launch:
    return launches.route(tokens=4096, experts=experts, slots=8, groups=1, weights=torch.bfloat16, aligned=True)


def attention(dtype: torch.dtype, head_width: int, value_width: int) -> Launch:
    shape = {"variants": 128, "batch": 1, "queries": 512, "width": 1, "kv_heads": 16, "group": 1}
    return launches.prefix_attention(**shape, head_width=head_width, value_width=value_width, dtype=dtype)


def logprob(dtype: torch.dtype, parts: int) -> Launch:
    return launches.target_logprob(rows=4096, vocabulary=50304, span=6400, parts=parts, dtype=dtype)


BUILT = {
    "masked_combine OLMoE": combine(torch.bfloat16, 8),
    "masked_combine float32": combine(torch.float32, 8),
    "masked_combine 64 slots": combine(torch.float16, 64),
    "masked_combine misaligned": combine(torch.bfloat16, 100),
    "route OLMoE": route(64),
    "route 1024 experts": route(1024),
    "group_count": launches.group_count(entries=32768, experts=64),
    "group_scan": launches.group_scan(experts=64),
    "group_scatter": launches.group_scatter(entries=32768, experts=64),
    "gather_rows": launches.gather_rows(tokens=4096, width=2048, dtype=torch.bfloat16, aligned=True),
    "prefix_attention OLMoE": attention(torch.bfloat16, 128, 128),
    "prefix_attention latent": attention(torch.bfloat16, 192, 128),
    "prefix_attention float32": attention(torch.float32, 128, 128),
    "target_logprob OLMoE": logprob(torch.bfloat16, 2),
    "target_logprob float32": logprob(torch.float32, 1),
    "clamped_swiglu": launches.swiglu(rows=32768, width=2880, dtype=torch.bfloat16, aligned=True, clamped=True),
    "swiglu": launches.swiglu(rows=32768, width=1024, dtype=torch.bfloat16, aligned=True),
}
"""Each kernel at the shapes of a real model, and where it needs most registers."""


def test_every_source_is_built() -> None:
    assert {launch.source for launch in BUILT.values()} == {path.name for path in SOURCES.glob("*.cu")}


@functools.cache
def nvcc_report(path: Path, defines: tuple[tuple[str, str | int], ...]) -> str:
    """What the compiler has to say of the kernels of a source."""
    flags = [f"-D{name}={value}" for name, value in defines]
    flags += [f"-gencode=arch={sm.replace('sm', 'compute')},code={sm}" for sm in ARCHITECTURES]
    command = [str(NVCC), "-std=c++17", "-Werror=all-warnings", "-fatbin", "-Xptxas=-v", *flags, str(path), "-o", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("kernel", BUILT)
def test_nvcc_builds_it_for_every_architecture_without_a_spill(kernel: str) -> None:
    """Prints registers by architecture: `-k nvcc -rP` shows them."""
    launch = BUILT[kernel]
    threads = math.prod(launch.block)
    for sm in ARCHITECTURES:
        about = rf"'{launch.name}' for '{sm}'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        match = re.search(about, nvcc_report(launch.path, launch.defines), re.DOTALL)
        assert match, f"nvcc does not report on {launch.name} for {sm}"
        spilled, registers = map(int, match.groups())
        print(f"{kernel:28} {sm:7} {registers:4} registers {spilled:4} bytes spilled, blocks of {threads} threads")
        assert not spilled
        assert registers * threads <= 65536, "a multiprocessor has no more"


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    names = ("libasan.so", "libstdc++.so")  # the latter too: torch throws C++ exceptions, which the former looks for at its start
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True) for name in names]
    preloaded = " ".join(one.stdout.strip() for one in found)
    path = os.pathsep.join([str(host.HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path, host.SANITIZE: "1"}
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, cwd=host.HERE.parents[1], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "files",
    [
        ("test_cuda_shim.py",),
        pytest.param(("test_cuda_kernels.py",), marks=pytest.mark.slow),
        pytest.param(("test_cuda_prefix_attention.py", "test_cuda_target_logprob.py"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_kernels_run_clean_under_the_sanitizers(files: tuple[str, ...]) -> None:
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not backwards and not torch.float16"]
    result = sanitized("-m", "pytest", *arguments, *(str(host.HERE.parent / name) for name in files))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


FAULTY = {
    "probe('write_past_the_end'), torch.zeros(5, dtype=torch.int32), 5": "heap-buffer-overflow",
    "probe('reverse', shared_bytes=124), torch.zeros(32), torch.zeros(32), 1": "heap-buffer-overflow",
    "probe('load_unaligned'), torch.zeros(4), torch.zeros(8)": "misaligned address",
}
IN_A_PROCESS_EACH = """
import os, sys, torch
from tests.kernels.cuda.host import run
from tests.kernels.test_cuda_shim import probe
for faulty in sys.argv[1:]:
    sys.stderr.write("--- next ---")
    sys.stderr.flush()
    child = os.fork()
    if not child:
        eval(f"run({faulty})")
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0, faulty
"""


def test_the_sanitizers_see_what_a_gpu_might_not() -> None:
    result = sanitized("-c", IN_A_PROCESS_EACH, *FAULTY)
    assert result.returncode == 0, result.stderr
    _, *reports = result.stderr.split("--- next ---")
    for said, expected in zip(reports, FAULTY.values(), strict=True):
        assert expected in said
