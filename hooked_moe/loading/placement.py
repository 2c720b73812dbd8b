"""Where weights go and how wide they are, as users say it: "bfloat16", "mps"."""

from __future__ import annotations

import torch

from hooked_moe.checks import unknown_name
from hooked_moe.loading.checkpoint import DTYPES


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point type, from its name too: "bfloat16", "torch.float32". Raises `ValueError` for others."""
    names = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in names:
            raise unknown_name("dtype", dtype, names, f"dtype must be one of {', '.join(names)}.")
        return names[name]
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, not {dtype!r}")
    return dtype


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that is there; None is the CPU. Raises `ValueError` with the devices there are."""
    if device is None:
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {str(device)!r}: this machine has {', '.join(available())}") from error
    if found.type not in ("cpu", "meta") and str(found) not in available():
        raise ValueError(f"there is no device {str(device)!r} here: this machine has {', '.join(available())}")
    return found


def available() -> list[str]:
    """The devices that torch can use on this machine, an accelerator's both by kind ("cuda") and by number ("cuda:0")."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        count = torch.accelerator.device_count()
        devices += [kind.type, *(f"{kind.type}:{index}" for index in range(count))]
    return devices
