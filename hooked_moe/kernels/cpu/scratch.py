from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory for one matrix at a time, used again: the system maps new memory page by page, which for the outputs of all experts
    takes a good part of the time that computing them does. Each thread has its own.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Uninitialised, of the dtype and on the device of `like`; what the last one held is lost."""
        size, kept = rows * columns, self._memory
        if kept is None or len(kept) < size or kept.dtype != like.dtype or kept.device != like.device:
            self._memory = kept = None  # before the new one is there
            with torch.inference_mode(False):  # so that it can be written to in any mode
                self._memory = kept = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(rows, columns)

    def release(self) -> None:
        self._memory = None
