"""A Ray cluster and the workers in it: how they start, what they are at, what became of it. Ray is imported when it is used."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hooked_moe.executors.work import Loader, Task

WAIT_NOTE_SECONDS = 30.0
"""After how long without news the log says that the cluster has no room."""


class MissingRayError(ImportError, ValueError):
    """The package ray is not installed."""


def import_ray() -> Any:
    """The package. Raises `MissingRayError`, which says how to get it."""
    try:
        import ray
    except ImportError as error:
        raise MissingRayError(
            "measuring on a Ray cluster needs the package ray, which is not installed: pip install 'hooked_moe[cluster]'"
        ) from error
    return ray


def connect(address: str) -> bool:
    """Join the cluster of this address, unless this process is in one already; returns whether it was not.

    "auto" is the cluster that runs on this machine, or else one of this machine alone, which ends with this process. Raises
    `ConnectionError` where no cluster answers.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
    joined = _known_address() if address == "auto" else address
    try:
        if joined is not None and not _answers(joined):
            if address == "auto" and "RAY_ADDRESS" not in os.environ:
                joined = "local"  # the cluster that was here has been killed, and ray.init would wait for it in vain
            else:
                raise ConnectionError("nothing answers there")
        ray.init(joined, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster can be joined at {joined or address!r} ({str(error).splitlines()[0]}): give the address that "
            "`ray start` showed, or auto"
        ) from error
    return True


def _known_address() -> str | None:
    """Where ray would look for a cluster of this machine; None: it has nowhere to look."""
    if "RAY_ADDRESS" in os.environ:
        return os.environ["RAY_ADDRESS"]
    directory = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    last = Path(directory) / "ray" / "ray_current_cluster"
    return last.read_text(encoding="utf-8").strip() if last.is_file() else None


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT; other kinds of addresses are left to ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return True
    try:
        with socket.create_connection((host, int(port)), timeout=5.0):
            return True
    except OSError:
        return False


def room(cpus: int, gpus: float) -> int:
    """How many workers with so much each the machines of the cluster can hold, were nothing else running there."""
    total = 0
    for node in import_ray().nodes():
        has: Mapping[str, float] = node["Resources"] if node["Alive"] else {}
        total += int(min(has.get("CPU", 0.0) // cpus, _room_on_gpus(has.get("GPU", 0.0), gpus)))
    return total


def _room_on_gpus(number: float, each: float) -> float:
    """A worker that takes a part of a GPU takes it of a single one."""
    if not each:
        return float("inf")
    return number // each if each >= 1 else number // 1 * int(1 / each + 1e-9)  # 1 // 0.2 is 4


class RayWorker:
    """A process of the cluster: what it has loaded, and the units that it does with it."""

    def load(self, loader: Loader, threads: int, device: str) -> str:
        """Load what units are done with; returns the name of the machine."""
        torch.set_num_threads(threads)
        self._resource = loader(device)
        return platform.node()

    def do(self, task: Task[Any], unit: Any) -> None:
        task.do(self._resource, unit)


@dataclass(eq=False)
class Worker:
    """A `RayWorker`, as it is seen from the driver."""

    actor: Any
    loading: Any
    """The reference of what it is loading; None once it is ready."""
    machine: str = "a machine"
    units: dict[Any, int] = field(default_factory=dict)
    """The numbers of the units given to it, in the order in which it does them, by their references."""

    @property
    def awaited(self) -> Any:
        """The reference of what it does now. Those after it are not looked at: of a dead worker they say nothing about whose
        fault it was."""
        return self.loading or next(iter(self.units), None)


@dataclass(frozen=True)
class Event:
    """What a worker has done: loaded (`number` None) or a unit; or what came in between."""

    worker: Worker
    number: int | None
    fault: BaseException | None = None
    died: bool = False


class Pool:
    """Workers that have loaded the same."""

    def __init__(self, loader: Loader, cpus: int, gpus: float, log: Callable[[str], object]) -> None:
        self.made_with = (loader, cpus, gpus)
        self.workers: list[Worker] = []
        self._log = log

    def start(self) -> None:
        """One worker more; it loads by itself."""
        loader, cpus, gpus = self.made_with
        actor = import_ray().remote(RayWorker).options(num_cpus=cpus, num_gpus=gpus).remote()
        self.workers.append(Worker(actor, actor.load.remote(loader, cpus, "cuda" if gpus else "cpu")))

    def end(self, worker: Worker) -> list[int]:
        """Kill a worker; returns the units that it leaves undone."""
        import_ray().kill(worker.actor)
        self.workers.remove(worker)
        return list(worker.units.values())

    def with_room(self, most: int) -> Iterator[Worker]:
        """Workers that are ready and have fewer than `most` units, those with fewest first."""
        while True:
            free = [worker for worker in self.workers if worker.loading is None and len(worker.units) < most]
            if not free:
                return
            yield min(free, key=lambda worker: len(worker.units))

    def busy(self) -> bool:
        return any(worker.units for worker in self.workers)

    def next_event(self) -> Event:
        """Wait until something happens."""
        ray = import_ray()
        owners = {worker.awaited: worker for worker in self.workers if worker.awaited is not None}
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(owners), num_returns=1, timeout=WAIT_NOTE_SECONDS)
            if not done and not self.busy():
                self._log("note: no worker is ready yet: they load, or wait until the Ray cluster has room for them")
        [reference] = done
        worker = owners[reference]
        number = worker.units.pop(reference, None)
        try:
            value = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            return Event(worker, number, error, died=True)
        except ray.exceptions.RayTaskError as error:
            return Event(worker, number, getattr(error, "cause", None) or error)
        if number is None:
            worker.loading, worker.machine = None, value
        return Event(worker, number)
