"""Units of work in processes of a Ray cluster, each of which loads the model once."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch

from hooked_moe.checks import whole_number
from hooked_moe.executors.ray_cluster import Event, Pool, connect, import_ray, room
from hooked_moe.executors.work import Loader, Unit, Work

UNITS_IN_FLIGHT = 2
"""How many units a worker has at most: the one that it does, and one that waits, so that it need not."""

RESTART_SECONDS = 2.0
"""How long after one that died while it loaded a worker is started: what its machine lacked may come back."""


class RayExecutor:
    """Units of work on a Ray cluster.

        with RayExecutor("auto") as executor:
            run.require("position", executor=executor)

    Workers load the model as this process has loaded it, and write what they measure themselves: model and run have to be at the
    same paths for all. A worker that dies costs the unit that it was at, which is done again; one that meets an error of its
    operating system, such as a full disk, is set aside, and the others take over.
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        workers: int | None = None,
        cpus: int | None = None,
        gpus: int | float | None = None,
        attempts: int = 3,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        """`address` is that of a cluster; "auto" means the one that runs on this machine, or else this machine alone.

        `workers` is their number; None: as many as the cluster has room for. `cpus` and `gpus` is what each is given; None: as
        many threads as a unit has in this process, and a GPU if the model of this process is on one. With a GPU, the model is
        loaded there. `attempts` is how many workers may die of one unit before that is an error. `log` gets notes on workers.

        Raises `MissingRayError` without the package ray, and `ValueError` for numbers that make no sense. The cluster is not
        asked for before there is work.
        """
        import_ray()
        self.address = address
        self._workers, self._cpus = (
            None if number is None else _positive(number, name) for number, name in ((workers, "workers"), (cpus, "cpus"))
        )
        if gpus is not None and not 0 <= gpus < float("inf"):
            raise ValueError(f"gpus must be a number from 0, not {gpus!r}")
        self._gpus = gpus
        self._attempts = _positive(attempts, "attempts")
        self._log = log
        self._pool: Pool | None = None
        self._connected = False

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and leave the cluster, if this executor has joined it."""
        self._end_pool()
        if self._connected:
            import_ray().shutdown()
            self._connected = False

    def places(self, work: Work[Unit]) -> int:
        """The number of workers. Raises `ValueError` where no machine of the cluster has what one is to be given."""
        self._connected = connect(self.address) or self._connected
        cpus, gpus = self._each(work)
        most = room(cpus, gpus)
        if not most:
            raise ValueError(f"no machine of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs for a worker: give it fewer")
        return most if self._workers is None else self._workers

    def run(self, work: Work[Unit], units: Sequence[Unit]) -> Iterator[Unit]:
        if not units:
            return
        loader, task = work.elsewhere()
        places = min(self.places(work), len(units))
        pool = self._pool_of(loader, *self._each(work))
        reference = import_ray().put(task)  # held here for as long as workers ask for it
        waiting, deaths = deque(range(len(units))), Counter[int | None]()
        try:
            for _ in range(places - len(pool.workers)):
                pool.start()
            while waiting or pool.busy():
                for worker in pool.with_room(UNITS_IN_FLIGHT):
                    if not waiting:
                        break
                    number = waiting.popleft()
                    worker.units[worker.actor.do.remote(reference, units[number])] = number
                event = pool.next_event()
                if event.fault is not None:
                    waiting.extendleft(reversed(self._undone(pool, event)))
                    deaths[event.number] += event.died
                    if deaths[event.number] >= self._attempts:
                        at = "it loaded" if event.number is None else f"it was at {units[event.number]}"
                        raise ChildProcessError(
                            f"a worker died while {at}, {self._attempts} times; the last time: {_in_short(event.fault)}. If "
                            "memory was short: fewer workers a machine, more CPUs each"
                        ) from event.fault
                elif event.number is not None:
                    yield units[event.number]
        except BaseException:
            self._end_pool()
            raise

    def _undone(self, pool: Pool, event: Event) -> list[int]:
        """What a worker leaves undone that has died, and is replaced, or that has met an error of its system. Raises others."""
        assert event.fault is not None
        undone = [] if event.number is None else [event.number]
        if event.died:
            self._log(f"note: a worker on {event.worker.machine} has died; another does what it was at")
            undone += pool.end(event.worker)
            if event.number is None:
                time.sleep(RESTART_SECONDS)
            pool.start()
        elif isinstance(event.fault, OSError) and len(pool.workers) > 1:
            undone += pool.end(event.worker)
            self._log(f"note: a worker on {event.worker.machine} is set aside: {event.fault}")
        else:
            raise event.fault
        return undone

    def _each(self, work: Work[Unit]) -> tuple[int, float]:
        """CPUs and GPUs of a worker."""
        cpus = max(1, torch.get_num_threads() // work.side_by_side) if self._cpus is None else self._cpus
        return cpus, float(work.on_gpu) if self._gpus is None else float(self._gpus)

    def _pool_of(self, loader: Loader, cpus: int, gpus: float) -> Pool:
        """The workers that have loaded this, or none yet."""
        if self._pool is None or self._pool.made_with != (loader, cpus, gpus):
            self._end_pool()
            self._pool = Pool(loader, cpus, gpus, self._log)
        return self._pool

    def _end_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            for worker in list(pool.workers):
                pool.end(worker)


def _positive(number: int, name: str) -> int:
    number = whole_number(number, name)
    if number < 1:
        raise ValueError(f"{name} must be a whole number from 1, not {number}")
    return number


def _in_short(error: BaseException) -> str:
    """The first line of a message and the last: Ray says what has happened in the one, and why in the other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(dict.fromkeys([lines[0], lines[-1]])).rstrip(".") if lines else type(error).__name__
