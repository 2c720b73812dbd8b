"""Workers that run inputs one after another, under limits; whatever kills one is an outcome of its input."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.fuzz.judge import judged, memory
from tests.fuzz.target import Target

HEADROOM = 2 * 10**9
"""Address space that a worker may take on top of what it has: enough for the outcome "memory" to be measured, not for the
machine to suffer."""


@dataclass(frozen=True)
class Result:
    target: str
    seed: int
    number: int
    outcome: str
    detail: str
    mutation: str


def make_input(target: Target, seed: int, number: int, directory: Path) -> str:
    """Write an input, which its numbers determine, and return what was done to it."""
    directory.mkdir(parents=True)
    return target.write(random.Random(f"{target.name}/{seed}/{number}"), directory)


def run_inputs(target: Target, seed: int, numbers: Iterable[int], workers: int) -> Iterator[Result]:
    """The results of these inputs, in the order in which they end."""
    waiting = sorted(numbers)
    shares = [waiting[i::workers] for i in range(workers)]
    running = [_Worker(target, seed, share) for share in shares if share]
    try:
        while running:
            ready = wait([worker.connection for worker in running], timeout=0.5)
            for worker in list(running):
                if worker.connection in ready:
                    yield from worker.take()
                elif worker.is_stuck():
                    yield worker.abandon("hang", f"more than {target.seconds:.0f} s")
                if worker.ended:
                    running.remove(worker)
    finally:
        for worker in running:
            worker.process.kill()


class _Worker:
    """A process for a share of the inputs, started again after each that ends it."""

    def __init__(self, target: Target, seed: int, numbers: list[int]) -> None:
        self.target, self.seed, self.left = target, seed, list(numbers)
        self.ended = False
        self._start()

    def _start(self) -> None:
        context = mp.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.target, self.seed, self.left), daemon=True)
        self.process.start()
        theirs.close()
        self._begun = (time.monotonic(), 0.0)

    def take(self) -> Iterator[Result]:
        """What the process has sent; the outcome of its end, where it has died."""
        try:
            result = Result(**json.loads(self.connection.recv()))
        except EOFError:
            self.process.join()
            if not self.left:
                self.ended = True
                return
            yield self.abandon("abort", f"signal {-(self.process.exitcode or 0)}")
            return
        self.left.remove(result.number)
        self._begun = (time.monotonic(), self._cpu_seconds())
        yield result

    def is_stuck(self) -> bool:
        began, cpu = self._begun
        return self._cpu_seconds() - cpu > self.target.seconds or time.monotonic() - began > 60 * self.target.seconds

    def abandon(self, outcome: str, detail: str) -> Result:
        """End the process and go on with a new one after the input that it was at."""
        self.process.kill()
        self.process.join()
        number = self.left.pop(0)
        if self.left:
            self._start()
        else:
            self.ended = True
        with tempfile.TemporaryDirectory() as directory:
            mutation = make_input(self.target, self.seed, number, Path(directory) / "input")
        return Result(self.target.name, self.seed, number, outcome, detail, mutation)

    def _cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(connection: Connection, target: Target, seed: int, numbers: list[int]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # panics are written there
    faulthandler.disable()  # which would speak through a descriptor of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + HEADROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for number in numbers:
            directory = Path(scratch) / str(number)
            mutation = make_input(target, seed, number, directory)
            outcome, detail = judged(target, directory)
            shutil.rmtree(directory, ignore_errors=True)
            connection.send(json.dumps(asdict(Result(target.name, seed, number, outcome, detail, mutation[:500]))))
    connection.close()
    os._exit(0)
