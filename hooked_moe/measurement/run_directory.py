"""The directory of a run: one plan, one writer of its tables, and nothing half-written.

`plan.json` says what the directory holds; `claim` refuses the directory to another plan and to a second writer. Processes that
write shards alone, which appear whole and say what they are of, share the directory (`claim_share`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from hooked_moe.checks import WrongTypeError, described, expanded_path
from hooked_moe.measurement.locks import Lock, Locks, SharedLock
from hooked_moe.measurement.share import Share
from hooked_moe.tables import read_checked_json, remove_temporaries, write_checked_json

WRITER_LOCK = "writer.lock"
WAIT_SECONDS = 60.0
"""How long the writer of a share waits while another prepares the directory."""
_SOON = 2.0
"""And how long before it says so."""


def results_directory(results: str | os.PathLike[str]) -> Path:
    """Where results go. Raises `WrongTypeError` for what is no path."""
    if not isinstance(results, str | os.PathLike):
        raise WrongTypeError(f"results must be a directory, as in results='results', not {described(results)}")
    return expanded_path(results)


def claim(directory: Path, plan: dict[str, Any]) -> filelock.BaseFileLock:
    """Make a directory for a plan of JSON values, or reopen it, and keep other writers out until the lock is released.

    The lock ends with the process that holds it, even a killed one. Half-written files of killed writers are removed.
    Raises `ValueError` if the directory was begun with another plan, `BlockingIOError` while another process writes there, and
    `OSError` where it cannot be made.
    """
    _make(directory)
    lock = writer_lock(directory)
    try:
        _prepare(directory, plan)
    except BaseException:
        lock.release()
        raise
    return lock


def claim_share(directory: Path, plan: dict[str, Any], share: Share, log: Callable[[str], object]) -> Lock:
    """As `claim`, for a process that writes a share of the shards beside others that write theirs.

    The first of them prepares the directory, which the others wait for; the log is told where that takes long. Raises
    `BlockingIOError` where another process writes tables there, or this very share.
    """
    _make(directory)
    lock = SharedLock(directory / WRITER_LOCK)
    try:
        if lock.acquire_alone():
            _prepare(directory, plan)
        if not lock.acquire_shared(_SOON):
            log(f"{directory} is being written by another process: share {share} waits for {WAIT_SECONDS:g} s")
        if not lock.acquire_shared(WAIT_SECONDS):
            raise BlockingIOError(
                f"{directory} is being written by another process, and not a share of it: wait for it, or give the run a name "
                "(--run, in Python name=)"
            )
        _check_plan(directory / "plan.json", plan)
        return Locks([_share_lock(directory, share), lock])
    except BaseException:
        lock.release()
        raise


def _share_lock(directory: Path, share: Share) -> filelock.BaseFileLock:
    locks = directory / "shards"
    locks.mkdir(exist_ok=True)
    lock = filelock.FileLock(locks / f"share-{share.number}-of-{share.of}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"share {share} of {directory} is being measured by another process: wait for it") from None
    return lock


def writer_lock(directory: Path) -> filelock.BaseFileLock:
    """The right to write in a run's directory, until `release`. Raises `BlockingIOError` while another process has it."""
    lock = filelock.FileLock(directory / WRITER_LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(
            f"{directory} is being written by another process: wait for it, or give the run a name (--run, in Python name=)"
        ) from None
    return lock


@contextmanager
def write_access(directory: Path) -> Iterator[None]:
    """`writer_lock`, for the length of a block."""
    lock = writer_lock(directory)
    try:
        yield
    finally:
        lock.release()


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the directory {directory}: {error.strerror}; give a directory for results that can be written to"
        raise OSError(error.errno, reason) from error


def _prepare(directory: Path, plan: dict[str, Any]) -> None:
    """Clear away what killed writers left half-written, and write the plan. Nothing else may be writing there."""
    for part in (directory, *directory.glob("shards/*"), directory / "prunings", directory / "figures"):
        remove_temporaries(part)
    _check_plan(directory / "plan.json", plan)


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
