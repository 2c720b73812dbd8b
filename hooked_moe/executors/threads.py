"""Units of work in threads of this process: what is used where no other executor is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from hooked_moe.executors.work import Unit, Work


@dataclass(frozen=True)
class Threads:
    """This process does all units, as many side by side as the work says."""

    def places(self, work: Work[Unit]) -> int:
        return 1

    def run(self, work: Work[Unit], units: Sequence[Unit]) -> Iterator[Unit]:
        return in_parallel(work.do, units, work.side_by_side)


def in_parallel(do: Callable[[Unit], object], units: Sequence[Unit], workers: int) -> Iterator[Unit]:
    """Do every unit in one of some threads, and yield it when it is done. An exception in one stops the others.

    On a CPU, documents side by side use the cores better than one document on all of them, whose operations are small and
    would wait for each other's threads; the cores are shared out among a few workers.
    """
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),))
    try:
        futures = {pool.submit(do, unit): unit for unit in units}
        for done in as_completed(futures):
            done.result()
            yield futures[done]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
