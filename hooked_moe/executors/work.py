"""What executors are given, and what they promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

Unit = TypeVar("Unit")
UnitIn = TypeVar("UnitIn", contravariant=True)

Loader = Callable[[str], Any]
"""Makes, in another process, what units are done with, such as a model, on the device given.

A loader can be pickled, and equals another one that would make the same: a worker that has loaded it need not do so again.
"""


@runtime_checkable
class Task(Protocol[UnitIn]):
    """What is done unit by unit. It can be pickled; what it needs besides (`resource`) is loaded where it runs."""

    def do(self, resource: Any, unit: UnitIn) -> None:
        """Do a unit, and leave its files."""


@runtime_checkable
class Work(Protocol[UnitIn]):
    """A task and what it needs, in this process."""

    @property
    def side_by_side(self) -> int:
        """How many units one process does at once."""

    @property
    def on_gpu(self) -> bool:
        """Whether units are done on a GPU here."""

    def do(self, unit: UnitIn) -> None:
        """Do a unit here."""

    def elsewhere(self) -> tuple[Loader, Task[UnitIn]]:
        """What another process does the same with. Raises `ValueError` where it could not."""


@dataclass(frozen=True)
class PlainWork(Generic[Unit]):
    """A task that needs nothing but its units."""

    task: Task[Unit]
    side_by_side: int = 1
    on_gpu: bool = False

    def do(self, unit: Unit) -> None:
        self.task.do(None, unit)

    def elsewhere(self) -> tuple[Loader, Task[Unit]]:
        return _nothing, self.task


def _nothing(device: str) -> None:
    """What a task that needs nothing loads."""


@runtime_checkable
class Executor(Protocol):
    """Does units of work somewhere."""

    def places(self, work: Work[Unit]) -> int:
        """How many processes share the units: as many large units are as good as more small ones."""

    def run(self, work: Work[Unit], units: Sequence[Unit]) -> Iterator[Unit]:
        """Do the units, in any order, and yield each when it is done. What one raises ends them all, and is raised here."""
