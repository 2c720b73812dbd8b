"""Residual streams that wait: in memory up to an allowance, past it in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def spill_directory(directory: Path | None) -> Path:
    """Where residual streams wait: the directory given, or the one for temporary files. Raises `OSError` where there is none."""
    if directory is not None:
        return directory
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no directory for temporary files, where residual streams wait ({error.strerror}): free some space "
            "there, or name another in TMPDIR"
        ) from error


@contextmanager
def named_errors(directory: Path | None) -> Iterator[None]:
    """Errors of the operating system say where residual streams wait, and how they can wait elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"residual streams that wait between layers cannot be kept in {spill_directory(directory)}: "
            f"{os.strerror(error.errno)}; free some space there, or name another directory in TMPDIR",
        ) from error


class SharedFile:
    """A temporary file that all waiting tensors share, because a process may have only a limited number of files open."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._users = 0

    def enter(self, nbytes: int) -> int:
        """Reserve `nbytes` of the file, and return where they begin. The first user opens it, or raises `OSError`."""
        if not self._users:
            with named_errors(self._directory):
                self.file = tempfile.TemporaryFile(prefix="hooked_moe_", suffix=".spill", dir=self._directory)  # noqa: SIM115
            self._end = 0
        self._users += 1
        self._end += nbytes
        return self._end - nbytes

    def leave(self) -> None:
        """End the use. The last user closes the file, which removes it."""
        self._users -= 1
        if not self._users:
            with named_errors(self._directory):
                self.file.close()

    def write(self, content: memoryview, start: int) -> None:
        """Write bytes into the file, where they begin at `start`."""
        with named_errors(self._directory):
            self.file.seek(start)
            self.file.write(content)
            self.file.flush()  # a full disk is this tensor's error, not a later one's

    def read(self, out: memoryview, start: int) -> None:
        """Fill `out` with the bytes that begin at `start`."""
        with named_errors(self._directory):
            self.file.seek(start)
            if self.file.readinto(out) != len(out):
                raise OSError(errno.EIO, "a file of waiting residual streams is shorter than what was written to it")


class Waiting:
    """Tensors that wait in a range of a file until `close`: one at its beginning, or several, each at its own offset."""

    def __init__(self, shared: SharedFile, nbytes: int) -> None:
        self._shared = shared
        self._start = shared.enter(nbytes)
        self._nbytes = nbytes
        self._free = 0

    def place_for(self, x: Tensor) -> int:
        """Reserve a part of the range for a tensor of this size, and return where it begins."""
        place = self._free
        self._free += x.nbytes
        return place

    def put(self, x: Tensor, place: int = 0) -> None:
        """Write the tensor out. Raises `OSError` where the disk is full."""
        assert place + x.nbytes <= self._nbytes, "the tensor is larger than the range that was claimed for it"
        self._shared.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, self._start + place)

    def get(self, out: Tensor, place: int = 0) -> None:
        """Read back as much as fills `out`."""
        bytes_ = torch.empty(out.numel() * out.element_size(), dtype=torch.uint8, device="cpu")
        self._shared.read(bytes_.numpy().data, self._start + place)
        out.copy_(bytes_.view(out.dtype).view(out.shape))

    def close(self) -> None:
        self._shared.leave()


class Spill:
    """Decides what may wait in memory: the first tensors whose bytes fit into `allowance` together.

    Nothing that has a memory budget waits in memory: a task may fill its budget alone, whatever else waits.
    """

    def __init__(self, allowance: int, directory: Path | None = None) -> None:
        self.allowance = allowance
        self.directory = directory
        self.written = 0
        """The bytes that were reserved in files, in all."""
        self._shared = SharedFile(directory)

    def claim(self, nbytes: int, in_file: bool = False) -> Waiting | None:
        """A range of a file; or None: wait in memory, and give the bytes back with `release`. `in_file` demands a file."""
        if nbytes <= self.allowance and not in_file:
            self.allowance -= nbytes
            return None
        self.written += nbytes
        return Waiting(self._shared, nbytes)

    def release(self, nbytes: int) -> None:
        self.allowance += nbytes
