"""The directory of a run: one plan, one writer, and nothing half-written.

`plan.json` says what the directory holds; `claim` refuses the directory to another plan and to a second writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from hooked_moe.tables import read_checked_json, remove_temporaries, write_checked_json


def claim(directory: Path, plan: dict[str, Any]) -> filelock.BaseFileLock:
    """Make a directory for a plan of JSON values, or reopen it, and keep other writers out until the lock is released.

    The lock ends with the process that holds it, even a killed one. Half-written files of killed writers are removed.
    Raises `ValueError` if the directory was begun with another plan, `BlockingIOError` while another process writes there, and
    `OSError` where it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the directory {directory}: {error.strerror}; give a directory for results that can be written to"
        raise OSError(error.errno, reason) from error
    lock = writer_lock(directory)
    try:
        for part in (directory, *directory.glob("shards/*"), directory / "prunings", directory / "figures"):
            remove_temporaries(part)
        _check_plan(directory / "plan.json", plan)
    except BaseException:
        lock.release()
        raise
    return lock


def writer_lock(directory: Path) -> filelock.BaseFileLock:
    """The right to write in a run's directory, until `release`. Raises `BlockingIOError` while another process has it."""
    lock = filelock.FileLock(directory / "writer.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"{directory} is being written by another process: wait for it, or give the run a name") from None
    return lock


@contextmanager
def write_access(directory: Path) -> Iterator[None]:
    """`writer_lock`, for the length of a block."""
    lock = writer_lock(directory)
    try:
        yield
    finally:
        lock.release()


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that was written before."""
    if not path.exists():
        write_checked_json(plan, path)
    existing = read_checked_json(path, "give another name to the run, or remove the directory to begin again")
    if existing != plan:
        changed = sorted(key for key in {*existing, *plan} if existing.get(key) != plan.get(key))
        raise ValueError(
            f"{path.parent} was begun with another {' and '.join(changed)}: give another name to the run, or remove the "
            "directory to begin again"
        )
