"""When kernels run, and what is said where they cannot; NVRTC, and its results on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_moe.kernels import dispatch, routing
from hooked_moe.kernels.cuda import launches, nvrtc
from hooked_moe.kernels.operators import launched_or_by_definition
from hooked_moe.kernels.weighted_sum import weighted_sum

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found out about devices, and what was said."""

    def clear() -> None:
        for cached in (dispatch.why_kernels_cannot_run, dispatch._why_device_cannot_run_them, dispatch.warn_once):
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, with all that it takes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "driver_version", lambda: (13, 1))
    monkeypatch.setattr(nvrtc, "compiled_architectures", lambda: [80, 90, 100])


def weigh() -> torch.Tensor:
    return weighted_sum(torch.ones(3, 2), torch.arange(3).view(1, 3), torch.ones(1, 3))


def test_on_a_cpu_torch_runs_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weigh().tolist() == [[3, 3]]
    assert not dispatch.use_kernels(torch.ones(1))


def test_kernels_that_are_asked_for_without_a_device_are_refused_once_and_torch_runs() -> None:
    with dispatch.using("cuda"):
        with pytest.warns(dispatch.KernelWarning, match="on cpu, not on a CUDA device.*torch's operations run instead"):
            assert weigh().tolist() == [[3, 3]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weigh()


def test_where_nothing_is_missing_kernels_run(gpu: None) -> None:
    assert dispatch.why_kernels_cannot_run(GPU) is None
    assert [dispatch.why_kernels_cannot_run(GPU, dtype) for dtype in (*dispatch.DTYPES, torch.int64)] == [None] * 4


def missing(error: Exception) -> Any:
    def fail() -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("what", "replacement", "says"),
    [
        ("driver_version", lambda: (12, 4), r"driver is too old: it runs CUDA 12.4, and NVRTC is of 13.0; update the driver"),
        ("compiler_version", missing(ImportError("No module named 'cuda'")), r"cuda-core is not installed.*hooked-moe\[cuda\]"),
        ("compiler_version", missing(RuntimeError("no libnvrtc.so")), r"NVRTC, .* was not found \(no libnvrtc.so\); pip install"),
        ("compiled_architectures", lambda: [75, 80], r"NVRTC 13.0 does not know the architecture of cuda:0, sm_90"),
    ],
    ids=["old driver", "no cuda-core", "no NVRTC", "NVRTC older than the device"],
)
def test_one_warning_names_what_is_missing(
    what: str, replacement: Any, says: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, what, replacement)
    with pytest.warns(dispatch.KernelWarning, match=says):
        assert not dispatch._kernels_can_run(GPU, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch._kernels_can_run(GPU, torch.bfloat16)


def test_an_old_device_and_a_dtype_without_kernels_are_named(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none for float64, only for float32, bfloat16, float16" in str(dispatch.why_kernels_cannot_run(GPU, torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "sm_75, and they need sm_80 or newer" in str(dispatch.why_kernels_cannot_run(GPU))


def test_sizes_without_a_kernel_are_named_once_and_the_definition_runs() -> None:
    run = launched_or_by_definition(routing._launch_route, routing._define_route)
    arguments = torch.randn(2, 2000), None, None, 3, False, 1.0, 1, 1, False, False
    with pytest.warns(dispatch.KernelWarning, match="route takes .* experts, not 2000"):
        weights, indices = run(*arguments)
    assert torch.equal(weights, arguments[0].softmax(-1).gather(1, indices))


def test_amd_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in str(dispatch.why_kernels_cannot_run(GPU))


def test_without_cuda_core_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "install the extra: pip install 'hooked-moe[cuda]'" in str(dispatch.why_kernels_cannot_run(GPU))


def test_without_a_display_driver_it_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "the display driver was not found" in str(dispatch.why_kernels_cannot_run(GPU))


def test_the_package_imports_nothing_of_cuda_and_the_environment_chooses() -> None:
    code = (
        "import sys; sys.modules['cuda'] = None; import hooked_moe, hooked_moe.counterfactuals;"
        "print([m for m in sys.modules if m.startswith('cuda.')], hooked_moe.kernels.dispatch._chosen)"
    )
    environment = os.environ | {dispatch.VARIABLE: "reference"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[] reference"


def test_another_choice_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="HOOKED_MOE_KERNELS must be one of auto, cuda, off, reference, or unset, not 'fast'"):
        dispatch._choice_of("fast")


def test_off_takes_no_kernel_even_on_a_gpu(gpu: None) -> None:
    on_gpu = torch.empty(1, device="meta")  # its device is not a CPU either
    with dispatch.using("off"):
        assert not dispatch.use_kernels(on_gpu)
    with dispatch.using("reference"):
        assert dispatch.use_kernels(on_gpu)


# --- NVRTC -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVRTC, which needs no GPU, and an empty cache. Skips where it is not installed."""
    try:
        nvrtc.compiler_version()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVRTC: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hooked_moe" / "kernels"


HALF = torch.bfloat16
ATTENTION = {"variants": 8, "batch": 1, "queries": 512, "width": 1, "kv_heads": 16, "group": 1}
EVERY_KERNEL = [
    launches.masked_combine(variants=8, tokens=512, slots=8, width=2048, dtype=HALF, mask=HALF, aligned=True),
    launches.route(tokens=4096, experts=64, slots=8, groups=1, weights=torch.float32, aligned=True),
    launches.group_count(entries=32768, experts=64),
    launches.gather_rows(tokens=4096, width=2048, dtype=HALF, aligned=True),
    launches.swiglu(rows=32768, width=1024, dtype=HALF, aligned=True),
    launches.prefix_attention(**ATTENTION, head_width=128, value_width=128, dtype=HALF),
    launches.target_logprob(rows=4096, vocabulary=50304, span=6400, parts=2, dtype=HALF),
]


@pytest.mark.parametrize("launch", EVERY_KERNEL, ids=lambda launch: launch.name)
def test_nvrtc_compiles_every_kernel_at_the_sizes_of_olmoe(launch: launches.Launch, compiler: Path) -> None:
    """Without a header of the system, and as cuda-core does it on a machine with a GPU."""
    assert nvrtc.compiled(launch.source, launch.defines, "sm_90").startswith(b"\x7fELF")


def test_what_was_compiled_is_kept_by_source_architecture_and_constants(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, defines = "swiglu.cu", (("SCALAR", "float32"), ("VECTOR", 1))
    code = nvrtc.machine_code(source, defines, "sm_90")
    (kept,) = compiler.iterdir()
    compiled: list[str] = []
    monkeypatch.setattr(nvrtc, "compiled", lambda source, defines, arch: compiled.append(arch) or b"other")
    assert nvrtc.machine_code(source, defines, "sm_90") == code
    assert not compiled
    nvrtc.machine_code(source, defines, "sm_80")
    nvrtc.machine_code(source, (*defines[:1], ("VECTOR", 4)), "sm_90")
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (99, 0))
    nvrtc.machine_code(source, defines, "sm_90")
    assert compiled == ["sm_80", "sm_90", "sm_90"]
    assert len(list(compiler.iterdir())) == 4
    monkeypatch.undo()
    assert nvrtc._read(kept) == code


def test_a_damaged_file_is_compiled_anew(compiler: Path) -> None:
    source, defines = "swiglu.cu", (("SCALAR", "float32"), ("VECTOR", 1))
    code = nvrtc.machine_code(source, defines, "sm_90")
    (kept,) = compiler.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert nvrtc.machine_code(source, defines, "sm_90") == code


def test_a_cache_that_cannot_be_written_is_said_and_does_without(compiler: Path) -> None:
    compiler.parent.mkdir()
    compiler.write_text("a file where the directory should be")
    with pytest.warns(RuntimeWarning, match=r"compiled kernels cannot be kept \(.*XDG_CACHE_HOME names another"):
        assert nvrtc.machine_code("swiglu.cu", (("SCALAR", "float32"), ("VECTOR", 1)), "sm_90")
