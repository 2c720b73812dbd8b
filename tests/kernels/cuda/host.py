"""Runs CUDA kernels on the CPU: their sources, built by the host's C++ compiler against `shim.h`, launched by `launches.py`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hooked_moe.kernels.cuda.launches import SOURCES, Launch

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "shim"
SANITIZE = "HOOKED_MOE_TEST_SANITIZE"
"""An environment variable: what runs has to be loaded under libasan then."""

_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared"]
_FLAGS += ["-fno-strict-aliasing"]  # CUDA allows to read memory as what it was not declared as
_FLAGS += ["-ftrivial-auto-var-init=pattern"]  # what was never written must not look like a zero
_FLAGS += ["-U_FORTIFY_SOURCE"]  # which forbids to jump from stack to stack
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
_SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class KernelError(RuntimeError):
    """What a GPU would have hung on, or answered with garbage."""


class _Geometry(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("backwards", ctypes.c_uint),
    ]


def run(launch: Launch, *arguments: Tensor | int | float | None, backwards: bool = False) -> None:
    """Run a kernel to its end; raise `KernelError` where it breaks CUDA's rules. `backwards`: the last block and thread first."""
    if launch.is_empty:
        return
    values = [_argument(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    uint3 = ctypes.c_uint * 3
    geometry = _Geometry(uint3(*launch.grid), uint3(*launch.block), launch.shared_bytes, backwards)
    error = _compiled(launch.name, launch.source, launch.defines)(ctypes.byref(geometry), pointers)
    if error is not None:
        raise KernelError(f"{launch.name}: {error.decode()}")


def _argument(value: Tensor | int | float | None) -> ctypes._SimpleCData:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value)


@functools.cache
def _compiled(name: str, source: str, defines: tuple[tuple[str, str | int], ...]) -> ctypes._CFuncPtr:
    shim = _built(HERE / "shim.cpp", [], [HERE / "shim.h"])
    flags = [f"-DKERNEL={name}", f'-DSOURCE="{source}"', *(f"-D{key}={value}" for key, value in defines)]
    flags += ["-include", str(HERE / "shim.h"), "-I", str(SOURCES), *_WARNINGS, str(shim), f"-Wl,-rpath,{shim.parent}"]
    headers = [HERE / "shim.h", SOURCES / source, *sorted(SOURCES.glob("*.cuh"))]
    function = ctypes.CDLL(str(_built(HERE / "launch.cpp", flags, headers))).launch
    function.restype = ctypes.c_char_p
    return function


def _built(source: Path, flags: list[str], reads: list[Path]) -> Path:
    """The shared library made of a source, from an earlier run where nothing of it has changed."""
    flags = [*_FLAGS, *(_SANITIZERS if os.environ.get(SANITIZE) else []), *flags]
    content = b"\0".join(path.read_bytes() for path in [source, *reads])
    key = hashlib.sha256(content + "\0".join(flags).encode()).hexdigest()[:24]
    library = BUILD / f"lib{source.stem}-{key}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as directory:  # whole or not at all: tests may run side by side
            made = Path(directory) / library.name
            environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # no libasan in g++ itself
            subprocess.run(["g++", str(source), *flags, "-o", str(made)], check=True, env=environment)
            made.replace(library)
    return library


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Not a number, or a number that is no index: what a kernel fails to write shows."""
    fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, fill, dtype=dtype)
