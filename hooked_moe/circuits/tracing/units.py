"""Batches of corrupted runs as units of work: done here one after another, or by an executor, the same numbers either way.

Elsewhere a unit leaves its numbers in a file, from which they are read bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from hooked_moe.circuits.tracing.batches import CorruptedRun, batches
from hooked_moe.circuits.tracing.measure import measure
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.circuits.tracing.rows import BatchRows, batch_rows
from hooked_moe.executors import Executor, ModelWork, await_arrival
from hooked_moe.loading.fingerprint import SameModel
from hooked_moe.tables import atomic_path
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
            np.savez(file, allow_pickle=False, **arrays)

    def path(self, unit: int) -> Path:
        """The file of a unit."""
        return self.directory / f"{unit:06d}.npz"

    def read(self, unit: int) -> BatchRows:
        """The numbers that `do` has written. Raises `OSError` where they cannot be seen here."""
        path = self.path(unit)
        missing = f"a worker has traced batch {unit}, but {path} is not there: all workers must see this directory"
        await_arrival(path.is_file, missing)
        with np.load(path, allow_pickle=False) as arrays:
            values = {name.removeprefix(_VALUE): arrays[name] for name in arrays.files if name.startswith(_VALUE)}
            rest = {name: arrays[name] for name in arrays.files if not name.startswith(_VALUE)}
        lists = {name: rest.pop(name).tolist() for name in ("sink", "places")}
        return BatchRows(runs=self.batches[unit], expert_values=values, **lists, **rest)


_NO_ARRAYS = ("runs", "expert_values")


def trace_batches(
    model: Transformer, task: TraceBatches, executor: Executor | None, directory: Path | None, done: Callable[[int], object]
) -> list[BatchRows]:
    """The numbers of all batches in order; `done` is told how many runs each had.

    `directory` is where an executor's workers leave their files for the while; None: a temporary one of this machine.
    """
    numbers = range(len(task.batches))
    if executor is None:
        parts = []
        for number in numbers:
            parts.append(task.rows(model, number))
            done(len(task.batches[number]))
        return parts
    with tempfile.TemporaryDirectory(prefix=".tracing-", dir=directory) as place:
        there = TraceBatches(**vars(task) | {"directory": Path(place).resolve()})
        for number in executor.run(ModelWork(model, there, check=SameModel.of(model)), numbers):
            done(len(task.batches[number]))
        return [there.read(number) for number in numbers]
