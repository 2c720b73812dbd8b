"""Where matrices begin in memory: MKL rounds products differently on matrices that begin elsewhere."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 64
"""Bytes: torch aligns new memory so, and MKL promises equal bits where matrices are."""


def begins_aligned(x: Tensor) -> bool:
    """Whether a tensor in memory of torch's begins as a new one does; asked of its offset, which traced tensors have too."""
    return x.storage_offset() * x.itemsize % ALIGNMENT == 0
