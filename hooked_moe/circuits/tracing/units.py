"""Batches of corrupted runs as units of work: done here one after another, or by an executor, the same numbers either way.

Where there is a directory for them, a unit leaves its numbers in a file, from which they are read bit for bit: by who shared out
the work, and by who begins again after it was interrupted.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import filelock
import numpy as np
import torch

from hooked_moe.circuits.tracing.batches import CorruptedRun, batches
from hooked_moe.circuits.tracing.measure import measure
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.circuits.tracing.rows import BatchRows, batch_rows
from hooked_moe.executors import Executor, ModelWork, Threads, await_arrival
from hooked_moe.loading.fingerprint import SameModel, computed_on, weights_sha256
from hooked_moe.tables import atomic_path, digest, remove_temporaries
from hooked_moe.transformer import Transformer

_VALUE = "value of "


@dataclass(frozen=True)
class TraceBatches:
    """What is measured of every batch: a task for executors, whose units are the numbers of batches."""

    batches: Sequence[Sequence[CorruptedRun]]
    protocol: Protocol
    sigma: float
    readings: Sequence[str]
    memory_budget: int | str | None
    necessity: bool
    directory: Path = Path()
    """Where `do` leaves its files."""

    @torch.no_grad()
    def rows(self, model: Transformer, number: int) -> BatchRows:
        """The numbers of a batch."""
        runs = self.batches[number]
        [batch] = batches(model, runs, self.protocol, self.sigma, len(runs))
        return batch_rows(measure(model, batch, self.readings, self.memory_budget, self.necessity))

    def do(self, resource: Transformer, unit: int) -> None:
        """Measure a batch, and write its numbers."""
        rows = self.rows(resource, unit)
        arrays = {field.name: np.asarray(getattr(rows, field.name)) for field in fields(rows) if field.name not in _NO_ARRAYS}
        arrays |= {_VALUE + name: value for name, value in rows.expert_values.items()}
        with atomic_path(self.path(unit)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy 2.0 has no allow_pickle, and would store it

    def path(self, unit: int) -> Path:
        """The file of a unit."""
        return self.directory / f"{unit:06d}.npz"

    def has(self, unit: int) -> bool:
        """Whether its numbers are there, and whole."""
        try:
            self._read(unit)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return True

    def read(self, unit: int) -> BatchRows:
        """The numbers that `do` has written. Raises `OSError` where they cannot be seen here."""
        path = self.path(unit)
        missing = f"a worker has traced batch {unit}, but {path} is not there: all workers must see this directory"
        await_arrival(path.is_file, missing)
        return self._read(unit)

    def _read(self, unit: int) -> BatchRows:
        with np.load(self.path(unit), allow_pickle=False) as arrays:
            values = {name.removeprefix(_VALUE): arrays[name] for name in arrays.files if name.startswith(_VALUE)}
            rest = {name: arrays[name] for name in arrays.files if not name.startswith(_VALUE)}
        lists = {name: rest.pop(name).tolist() for name in ("sink", "places")}
        return BatchRows(runs=self.batches[unit], expert_values=values, **lists, **rest)


_NO_ARRAYS = ("runs", "expert_values")


def trace_batches(
    model: Transformer, task: TraceBatches, executor: Executor | None, directory: Path | None, done: Callable[[int], object]
) -> list[BatchRows]:
    """The numbers of all batches in order; `done` is told how many runs each had.

    In `directory` the numbers of every batch are kept until all are there: what is interrupted goes on where it stopped. None: an
    executor's workers leave them in a temporary directory of this machine. Raises `BlockingIOError` while another process traces
    the same in it.
    """
    numbers = range(len(task.batches))
    if executor is None and directory is None:
        parts = []
        for number in numbers:
            parts.append(task.rows(model, number))
            done(len(task.batches[number]))
        return parts
    same = SameModel.of(model)
    with _temporary() if directory is None else _kept(directory, _name(model, task, same)) as place:
        there = TraceBatches(**vars(task) | {"directory": place.resolve()})
        pending = [number for number in numbers if not there.has(number)]
        done(sum(len(task.batches[number]) for number in set(numbers).difference(pending)))
        for number in (executor or Threads()).run(ModelWork(model, there, check=same), pending):
            done(len(task.batches[number]))
        return [there.read(number) for number in numbers]


def _name(model: Transformer, task: TraceBatches, same: SameModel) -> str:
    """Of the directory that these numbers alone go to."""
    weights = same.plan["model"]["weights_sha256"] or weights_sha256(model)  # workers do not compare those of streamed models
    return f".tracing-{digest(same.plan | {'weights': weights, 'task': repr(task), 'on': computed_on(model.cfg.device)})[:16]}"


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tracing-") as place:
        yield Path(place)


@contextmanager
def _kept(directory: Path, name: str) -> Iterator[Path]:
    """A directory for the while, which is removed when the block ends well; else it stays for the next time."""
    place = directory / name
    place.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(place / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"{place} is being written by another process, which traces the same: wait for it") from None
    try:
        remove_temporaries(place)
        yield place
        shutil.rmtree(place)
    finally:
        lock.release()
