"""How fast devices multiply matrices: published peaks of some, and a measurement of this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK_UTILISATION = 0.3
"""The share of a published peak that the audit is taken to reach. An assumption: no card has been measured. Products alone
reach two thirds to three quarters of a peak at most, and the audit about half of what products reach (below)."""
SUSTAINED_UTILISATION = 0.5
"""The share of the rate that torch.mm keeps up on the same machine: 49% in bfloat16 and 71% in float32 at OLMoE's widths, 63% and
69% at d_model 1,024, on two cores of a CPU (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Device:
    """A device by its maker's data sheet: dense products, without structured sparsity."""

    about: str
    memory: float
    """GB, 10^9 bytes."""
    bfloat16: float
    """TFLOP/s, accumulated in float32."""
    float32: float
    """TFLOP/s, without TF32, which torch leaves off unless it is asked for."""

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second; float16 is as fast as bfloat16 on all of these."""
        return 1e12 * (self.float32 if dtype == torch.float32 else self.bfloat16)


DEVICES = {
    "a100": Device("NVIDIA A100 SXM, 80 GB", memory=80.0, bfloat16=312.0, float32=19.5),
    "h100": Device("NVIDIA H100 SXM, 80 GB", memory=80.0, bfloat16=989.0, float32=67.0),
    "h200": Device("NVIDIA H200 SXM, 141 GB", memory=141.0, bfloat16=989.0, float32=67.0),
    "b200": Device("NVIDIA B200 (HGX), 180 GB", memory=180.0, bfloat16=2250.0, float32=75.0),
    "l40s": Device("NVIDIA L40S, 48 GB", memory=48.0, bfloat16=362.0, float32=91.6),
    "rtx-4090": Device("NVIDIA GeForce RTX 4090, 24 GB", memory=24.0, bfloat16=165.0, float32=82.6),
}
"""By the names that `--device` takes."""


def products_per_second(a: Tensor, b: Tensor, seconds: float) -> float:
    """Products a b^T per second while they go on for so long; at least one."""
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not done:
        torch.mm(a, b.T)
        if a.is_cuda:
            torch.cuda.synchronize()
        done += 1
    return done / spent


def sustained_rate(dtype: torch.dtype, device: torch.device, seconds: float = 1.0, size: int = 2048) -> float:
    """Operations per second that square products of `size` keep up on a device of this machine, after a warm-up."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype) for _ in range(2))
    products_per_second(a, b, seconds / 5)
    return 2 * size**3 * products_per_second(a, b, seconds)


def memory_of(device: torch.device) -> float:
    """GB of a device of this machine; of the CPU, all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
