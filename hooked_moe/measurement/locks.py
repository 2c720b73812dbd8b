"""Locks on files, for one process or for several that do not disturb each other; they end with the process that holds them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.05


@runtime_checkable
class Lock(Protocol):
    """What can be let go."""

    def release(self) -> object:
        """Let others have it."""


@dataclass(frozen=True)
class Locks:
    """Several locks, let go together in their order."""

    locks: Sequence[Lock]

    def release(self) -> None:
        for lock in self.locks:
            lock.release()


class SharedLock:
    """A lock that many processes hold together, or one alone. `filelock.FileLock` on the same file is one that is held alone.

    Between machines `flock` acts on NFS from version 4 on, and on Lustre where it is mounted with -o flock.
    """

    def __init__(self, path: Path) -> None:
        """Raises `NotImplementedError` where the operating system has no such locks."""
        if fcntl is None:
            raise NotImplementedError("shares of a measurement take file locks that only POSIX systems have: run without a share")
        self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire_alone(self) -> bool:
        """Whether nobody holds it, and this process now does, alone."""
        return self._try(fcntl.LOCK_EX)

    def acquire_shared(self, seconds: float) -> bool:
        """Hold it along with others, also when it was held alone before; False if another holds it alone all this time."""
        until = time.monotonic() + seconds
        while not self._try(fcntl.LOCK_SH):
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def release(self) -> None:
        """Let others have it; the lock cannot be acquired again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _try(self, kind: int) -> bool:
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
