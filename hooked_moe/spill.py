"""Residual streams that wait: in memory up to an allowance, past it in files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Waiting:
    """Tensors that wait in a file, which goes with `close`: one at its beginning, or several, each at its place."""

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.TemporaryFile(prefix="hooked_moe_", suffix=".spill", dir=directory)  # noqa: SIM115 (see close)
        self._free = 0

    def place_for(self, x: Tensor) -> int:
        """Where in the file a tensor of this size may wait from now on."""
        place = self._free
        self._free += x.nbytes
        return place

    def put(self, x: Tensor, place: int = 0) -> None:
        """Write the tensor out. Raises `OSError` where the disk is full."""
        self._file.seek(place)
        self._file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def get(self, out: Tensor, place: int = 0) -> None:
        """Read back as much as fills `out`."""
        self._file.seek(place)
        bytes_ = torch.empty(out.numel() * out.element_size(), dtype=torch.uint8)
        if self._file.readinto(bytes_.numpy().data) != len(bytes_):
            raise OSError("a file of waiting residual streams is shorter than what was written to it")
        out.copy_(bytes_.view(out.dtype).view(out.shape))

    def close(self) -> None:
        self._file.close()


class Spill:
    """Decides what may wait in memory: the first tensors whose bytes fit into `allowance` together."""

    def __init__(self, allowance: int, directory: Path | None = None) -> None:
        self.allowance = allowance
        self.directory = directory
        self.written = 0
        """Bytes for which a file was opened, in all."""

    def claim(self, nbytes: int) -> Waiting | None:
        """None: wait in memory, and give the bytes back with `release`. Or a file."""
        if nbytes <= self.allowance:
            self.allowance -= nbytes
            return None
        self.written += nbytes
        return Waiting(self.directory)

    def release(self, nbytes: int) -> None:
        self.allowance += nbytes
