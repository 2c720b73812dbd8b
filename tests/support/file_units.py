"""Units of work that need no model: each leaves a file, or what a unit can come to besides."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any


class Files:
    """A task that needs no model. Units are (kind, name): NAME is left by what did it, NAME.attempts by all that began to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def do(self, resource: Any, unit: tuple[str, str]) -> None:
        kind, name = unit
        attempts = self.directory / f"{name}.attempts"
        with open(attempts, "a") as file:
            file.write(f"{os.getpid()}\n")
        first = len(attempts.read_text().splitlines()) == 1
        if kind == "dies" or (kind == "dies once" and first):
            time.sleep(1)  # what was done before has been reported by then
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "all disks are full" or (kind == "full disk" and first):
            raise OSError(errno.ENOSPC, "cannot write: No space left on device")
        if kind == "fails":
            raise ValueError(f"{name} cannot be done")
        if kind == "slow":
            time.sleep(0.3)
        (self.directory / name).write_text(str(os.getpid()))
