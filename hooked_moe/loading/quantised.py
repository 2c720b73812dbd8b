"""Weights stored in fewer bits with a scale for each block of them, widened while they are read.

    fp8     `X.weight` in e4m3, times `X.weight_scale_inv`, one float32 for each 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section
            3.3.1). The last blocks of a matrix may be cut off.
    mxfp4   `X_blocks`, two e2m1 to a byte, the first in its low half; times 2^(`X_scales` - 127), one for each 32 neighbours in a
            row (gpt-oss; OCP Microscaling Formats v1.0).

A checkpoint then has a tensor `X.weight`, or `X_blocks`, of the widened shape, and no scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

FP8_BLOCK, MXFP4_BLOCK = 128, 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
"""Types of stored tensors by their names in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """By its name in safetensors, such as "BF16"."""
    start: int
    """The byte of the file at which its values begin."""

    @property
    def nbytes(self) -> int:
        return STORED[self.dtype].itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor that is two in the files: rows of values, and rows of their scales."""

    values: StoredTensor
    scales: StoredTensor
    shape: tuple[int, ...]
    rows_to_a_scale: int
    """How many rows of values a row of scales is for."""
    widen: Callable[[Tensor, Tensor], Tensor]
    """Makes float32 of some rows of values and their rows of scales."""

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def start(self) -> int:
        return self.values.start

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def widen_fp8(
    values: Float[Tensor, "row column"], scales: Float[Tensor, "row_block column_block"]
) -> Float[Tensor, "row column"]:
    """Each value times the scale of its block."""
    by_column = scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : values.shape[1]]
    return values.float() * by_column.repeat_interleave(FP8_BLOCK, dim=0)[: len(values)]


def widen_mxfp4(values: UInt8[Tensor, "row half_column"], scales: UInt8[Tensor, "row block"]) -> Float[Tensor, "row column"]:
    """Each value of the table times the power of two of its block."""
    nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
    numbers = torch.tensor(E2M1, dtype=torch.float32, device="cpu")[nibbles.int()].unflatten(1, (-1, MXFP4_BLOCK))
    return torch.ldexp(numbers, scales.int().unsqueeze(-1) - 127).flatten(1)


def widened(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | QuantisedTensor]:
    """The tensors of a checkpoint's files, in which values and their scales are one."""
    tensors: dict[str, StoredTensor | QuantisedTensor] = dict(stored)
    for name, values in stored.items():
        scales = stored.get(f"{name}_scale_inv")
        if values.dtype == "F8_E4M3" and scales is not None and _are_fp8(values, scales):
            tensors[name] = QuantisedTensor(values, scales, values.shape, FP8_BLOCK, widen_fp8)
            del tensors[f"{name}_scale_inv"]
        plain = name.removesuffix("_blocks")
        if plain == name:
            continue
        scales = stored.get(f"{plain}_scales")
        if values.dtype == "U8" and scales is not None and _are_mxfp4(values, scales):
            shape = (*values.shape[:-2], values.shape[-2] * MXFP4_BLOCK)
            tensors[name] = QuantisedTensor(values, scales, shape, 1, widen_mxfp4)
            del tensors[f"{plain}_scales"]
        elif values.dtype != "U8" and scales is None and plain not in stored:
            tensors[plain] = tensors.pop(name)  # transformers 5 saves the tensor that it has widened under the name of the blocks
    return tensors


def _are_fp8(values: StoredTensor, scales: StoredTensor) -> bool:
    return (
        scales.dtype == "F32" and scales.shape == tuple(-(-size // FP8_BLOCK) for size in values.shape) and len(scales.shape) == 2
    )


def _are_mxfp4(values: StoredTensor, scales: StoredTensor) -> bool:
    return scales.dtype == "U8" and values.shape == (*scales.shape, MXFP4_BLOCK // 2)
