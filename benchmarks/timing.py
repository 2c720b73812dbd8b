"""Fair timing in one process: warm-up, then the candidates in turns, then medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def timed(candidates: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every repeat of every candidate. They take turns, so that a slow moment of the machine hits all of them."""
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> str:
    """Median and range."""
    return f"{median(seconds):.4f} s (of {len(seconds)}: {min(seconds):.4f} to {max(seconds):.4f})"
