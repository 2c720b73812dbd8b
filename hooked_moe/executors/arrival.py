"""Waiting for what a worker has written, which network file systems may not show at once."""

from __future__ import annotations

import time
from collections.abc import Callable

ARRIVAL_SECONDS = 90.0
"""How long a file that a worker has written may take until it is seen here: file systems remember what was not there."""


def await_arrival(arrived: Callable[[], bool], missing: str) -> None:
    """Return once `arrived`. Raises `OSError`, which says what is `missing`, where that does not come about."""
    until = time.monotonic() + ARRIVAL_SECONDS
    while not arrived():
        if time.monotonic() > until:
            raise OSError(missing)
        time.sleep(0.2)
