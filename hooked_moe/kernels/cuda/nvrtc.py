"""CUDA sources of this package into running kernels: compiled at first use, kept on disk, launched on torch's current stream.

NVRTC, NVIDIA's compiler as a library, is reached through NVIDIA's `cuda-core` (extra `cuda`); nothing here is imported before
a tensor on a CUDA device asks for a kernel, and no compiler has to be on the machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_moe.kernels.cuda.launches import SOURCES, Launch

OPTIONS = "-std=c++17"
"""That every kernel is compiled with; part of the key of the cache."""
_DEFAULT_STREAM = 1
"""CU_STREAM_LEGACY: what torch calls 0, which other libraries may take for no stream."""
_PLAIN_SHARED_BYTES = 48 << 10
"""Shared memory that a block has without asking for more."""

Defines = tuple[tuple[str, str | int], ...]
Argument = Tensor | int | float | None
"""An argument of a kernel: `T*` (None is the null pointer), `long long`, `float`."""


class Stream:
    """torch's current stream of a device, in the protocol by which CUDA libraries take each other's streams."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream or _DEFAULT_STREAM

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def run(launch: Launch, *arguments: Argument) -> None:
    """Launch a kernel on the device of its first tensor; does nothing for an empty grid. Nothing waits for it."""
    if launch.is_empty:
        return
    from cuda.core import LaunchConfig
    from cuda.core import launch as start

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device):
        kernel = _loaded(launch.source, launch.name, launch.defines, launch.shared_bytes, device)
        config = LaunchConfig(grid=launch.grid, block=launch.block, shmem_size=launch.shared_bytes)
        start(Stream(device), config, kernel, *map(_passed, arguments))


def _passed(argument: Argument) -> Any:
    """As cuda-core takes it: Python's whole numbers have the size of pointers, which is that of `long long`."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument or 0


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90": what the device's machine code is made for."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _loaded(source: str, name: str, defines: Defines, shared_bytes: int, device: torch.device) -> Any:
    """The kernel in the memory of a device, allowed as much shared memory as it needs."""
    from cuda.core import ObjectCode

    kernel = ObjectCode.from_cubin(machine_code(source, defines, architecture(device)), name=source).get_kernel(name)
    if shared_bytes > _PLAIN_SHARED_BYTES:
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, device.index)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} needs {shared_bytes:,} bytes of shared memory in a block: {error.name} on {device}")
    return kernel


def machine_code(source: str, defines: Defines, arch: str) -> bytes:
    """The compiled source: from the cache, or from NVRTC and then into the cache."""
    directory = cache_directory()
    if directory is None:
        _warn_of_no_cache("there is no home directory")
        return compiled(source, defines, arch)
    kept = directory / f"{Path(source).stem}-{arch}-{_key(source, defines, arch)}.cubin"
    code = _read(kept)
    if code is None:
        code = compiled(source, defines, arch)
        _write(kept, code)
    return code


def compiled(source: str, defines: Defines, arch: str, log: Any = None) -> bytes:
    """By NVRTC, which needs no GPU. `log` takes what the assembler says: registers, spills. Raises cuda-core's `NVRTCError`."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=source,
        arch=arch,
        std=OPTIONS.removeprefix("-std="),
        define_macro=[(name, str(value)) for name, value in defines] or None,
        include_path=str(SOURCES),
        ptxas_options=None if log is None else ["-v"],
    )
    program = Program((SOURCES / source).read_text(encoding="utf-8"), code_type="c++", options=options)
    code = program.compile("cubin", logs=log).code
    assert isinstance(code, bytes)
    return code


def compiler_version() -> tuple[int, int]:
    """The version of NVRTC. Raises `ImportError` without cuda-core or cuda-bindings, `RuntimeError` without the library."""
    import cuda.core  # noqa: F401  (what compiles and launches; it says if cuda-bindings is missing)
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def compiled_architectures() -> list[int]:
    """Those that NVRTC knows, as 90 for sm_90."""
    from cuda.bindings import nvrtc

    return list(nvrtc.nvrtcGetSupportedArchs()[1])


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the display driver runs."""
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return version // 1000, version % 1000 // 10


def cache_directory() -> Path | None:
    """`$XDG_CACHE_HOME/hooked_moe/kernels`, which is in ~/.cache unless set; None for a user without a home directory."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "hooked_moe" / "kernels"


def _key(source: str, defines: Defines, arch: str) -> str:
    """Everything that the machine code depends on: the sources, the macros, the architecture, the options, the compiler."""
    digest = hashlib.sha256(repr((source, defines, arch, OPTIONS, compiler_version())).encode())
    for text in (SOURCES / source, *sorted(SOURCES.glob("*.cuh"))):
        digest.update(text.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """A kept file without its checksum; None if there is none, or if it is not what was written."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    """In one step, so that another process finds the whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, path)
    except OSError as error:
        _warn_of_no_cache(f"{path.parent}: {error}")


def _warn_of_no_cache(reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept ({reason}), so that every process compiles them again; XDG_CACHE_HOME names another "
        "directory",
        RuntimeWarning,
        stacklevel=3,
    )
