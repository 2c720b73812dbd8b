"""Commands killed at the moments that matter, in processes of their own, and given again until they end.

A moment is the time before or after a call that changes what is on the disk: a file is flushed, takes its name, is deleted; a
table gets more rows. Between two of them nothing happens that a later process could see, so kills at moments stand for kills at
any time.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

CHANGES: tuple[tuple[Any, str, tuple[bool, ...]], ...] = (
    (os, "fsync", (True,)),
    (os, "replace", (True, False)),
    (os, "unlink", (True,)),
    (os, "rmdir", (True, False)),
    (pq.ParquetWriter, "write_table", (False,)),
)
"""The calls, and whether the moment is before (True) or after them."""
Stage = Callable[[], int]
"""A command; returns its exit code."""


def forked(work: Callable[[], int], seconds: float | None = None) -> int:
    """Exit code of `work` in a process of its own, as in `subprocess`; killed after `seconds` if it takes longer."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 70
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup` and a shell's `&` may have switched off
        try:
            code = work()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def at_moments(act: Callable[[int], object]) -> Iterator[None]:
    """Call `act` at every moment, with its number, from 1."""
    count = 0

    def watched(original: Callable[..., Any], moments: tuple[bool, ...]) -> Callable[..., Any]:
        def reached(before: bool) -> None:
            nonlocal count
            if before in moments:
                count += 1
                act(count)

        def call(*inputs: Any, **options: Any) -> Any:
            reached(True)
            result = original(*inputs, **options)
            reached(False)
            return result

        return call

    originals = [(owner, name, getattr(owner, name), moments) for owner, name, moments in CHANGES]
    for owner, name, original, moments in originals:
        setattr(owner, name, watched(original, moments))
    try:
        yield
    finally:
        for owner, name, original, _ in originals:
            setattr(owner, name, original)


def moments_of(work: Stage) -> int:
    """How many moments a command has that nothing disturbs. It has to end well."""
    count = 0

    def last(number: int) -> None:
        nonlocal count
        count = number

    with at_moments(last):
        assert work() == 0
    return count


def signalled_at(moment: int, number: signal.Signals, work: Stage) -> int:
    """The exit code of a command in a process of its own that is sent a signal at one of its moments."""

    def signalled() -> int:
        with at_moments(lambda count: os.kill(os.getpid(), number) if count == moment else None):
            return work()

    return forked(signalled)


def with_kills(stages: Sequence[Stage], moments: Sequence[int], kills: int, chance: random.Random) -> int:
    """Run the stages, each with its share of `kills` at random moments, and given again after each until it ends.

    `moments` counts those of the undisturbed stages. What is resumed has at least about as many as were left, so a kill is drawn
    from these. Returns the number of kills that took place.
    """
    killed = 0
    for number, (stage, count) in enumerate(zip(stages, moments, strict=True)):
        left = count
        for _ in range(kills * (number + 1) // len(stages) - kills * number // len(stages)):
            moment = chance.randint(1, max(1, left))
            code = signalled_at(moment, signal.SIGKILL, stage)
            assert code in (0, -signal.SIGKILL), code
            killed += code != 0
            left -= moment
        assert forked(stage) == 0
    return killed


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
