"""Which form of an operation runs: a CUDA kernel of this package, torch's operations, or the plain reference.

The environment variable HOOKED_MOE_KERNELS chooses:

    (unset)      kernels for tensors on a CUDA device, torch's operations for all others
    cuda         the same, and a warning where there is no such device
    off          torch's operations everywhere
    reference    the same calls as with kernels, each by its definition in torch: slow, on any device; the reference of all tests

Where kernels are asked for and cannot run, one warning says what is missing, and torch's operations take over.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from hooked_moe.kernels.cuda import nvrtc

Choice = Literal["auto", "cuda", "off", "reference"]
VARIABLE = "HOOKED_MOE_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""Compute capability: bfloat16 and asynchronous copies begin there (Ampere, 2020)."""


class KernelWarning(RuntimeWarning):
    """Kernels were asked for and cannot run."""


def _choice_of(value: str | None) -> Choice:
    """The choice that the value of the environment variable names."""
    for choice in get_args(Choice):
        if choice == (value or "auto"):
            return choice
    raise ValueError(f"{VARIABLE} must be one of {', '.join(get_args(Choice))}, or unset, not {value!r}")


_chosen: Choice = _choice_of(os.environ.get(VARIABLE))


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Another choice while the context lasts, in the whole process."""
    global _chosen
    before, _chosen = _chosen, _choice_of(choice)
    try:
        yield
    finally:
        _chosen = before


def use_reference() -> bool:
    """Whether operators of this package run by their definition, wherever their tensors are."""
    return _chosen == "reference"


def use_kernels(x: Tensor) -> bool:
    """Whether operators of this package run on tensors like this one, rather than torch's. Warns once where that is asked for
    and impossible."""
    if _chosen == "off" or (_chosen == "auto" and x.device.type != "cuda"):
        return False
    return _chosen == "reference" or _kernels_can_run(x.device, x.dtype)


def _kernels_can_run(device: torch.device, dtype: torch.dtype) -> bool:
    missing = why_kernels_cannot_run(device, dtype)
    if missing is not None:
        warn_once(missing)
    return missing is None


@functools.cache
def warn_once(missing: str) -> None:
    """Say why kernels do not run, the first time that it is so."""
    message = f"the CUDA kernels of hooked_moe cannot run: {missing}. torch's operations run instead ({VARIABLE}=off: quietly)"
    warnings.warn(message, KernelWarning, stacklevel=4)


@functools.cache
def why_kernels_cannot_run(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """What keeps kernels from running on tensors of this device and dtype, and what to do about it; None if nothing does."""
    if device.type != "cuda":
        advice = "torch finds one: move the model there" if torch.cuda.is_available() else "torch finds none"
        return f"the tensors are on {device}, not on a CUDA device ({advice})"
    if torch.version.hip is not None:
        return "this is torch for AMD GPUs, and the kernels are for NVIDIA's"
    if dtype.is_floating_point and dtype not in DTYPES:
        known = ", ".join(name_of(known) for known in DTYPES)
        return f"there are none for {name_of(dtype)}, only for {known}"
    return _why_device_cannot_run_them(device)


@functools.cache
def _why_device_cannot_run_them(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{device} has architecture sm_{capability[0]}{capability[1]}, and they need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    try:
        compiler, known = nvrtc.compiler_version(), nvrtc.compiled_architectures()
    except ImportError as error:
        return f"cuda-core is not installed, or not whole ({error}); install the extra: pip install 'hooked-moe[cuda]'"
    except RuntimeError as error:  # of cuda-pathfinder: a library of NVIDIA's that is not there
        return f"NVRTC, which compiles them, was not found ({error}); pip install nvidia-cuda-nvrtc of torch's CUDA version"
    try:
        driver = nvrtc.driver_version()
    except RuntimeError as error:
        return f"the display driver was not found ({error})"
    if driver[0] < compiler[0]:
        return (
            f"the display driver is too old: it runs CUDA {driver[0]}.{driver[1]}, and NVRTC is of {compiler[0]}.{compiler[1]}; "
            "update the driver, or install cuda-bindings and nvidia-cuda-nvrtc of the driver's version"
        )
    if capability[0] * 10 + capability[1] not in known:
        return (
            f"NVRTC {compiler[0]}.{compiler[1]} does not know the architecture of {device}, sm_{capability[0]}{capability[1]}; "
            "install a newer nvidia-cuda-nvrtc"
        )
    return None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
