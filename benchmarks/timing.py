"""Fair timing in one process: warm-up, then the candidates in turns, then medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median


def timed(candidates: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every repeat of every candidate. They take turns, so that a slow moment of the machine hits all of them."""
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run))
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def summary(seconds: Sequence[float]) -> str:
    """Median (lowest to highest), in seconds or, where that reads better, in milliseconds or microseconds."""
    scale, unit = next((s, u) for s, u in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")) if median(seconds) * s >= 1 or u == "µs")
    middle, low, high = (_three_digits(x * scale) for x in (median(seconds), min(seconds), max(seconds)))
    return f"{middle} {unit} ({low} to {high})"


def ratio(seconds: Sequence[float], peer: Sequence[float]) -> str:
    """How much longer than the peer, turn by turn: median (lowest to highest)."""
    by_turn = [one / other for one, other in zip(seconds, peer, strict=True)]
    return f"{_three_digits(median(by_turn))} ({_three_digits(min(by_turn))} to {_three_digits(max(by_turn))})"


def _three_digits(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}"
