"""Progress bars: one look for all, off in library functions unless `progress=True`, on in commands.

with progress_bar(len(texts), "measuring", "text", shown=progress, done=already) as bar:
    bar.update()
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int | None, what: str, unit: str, *, shown: bool, done: int = 0, **options: Any) -> Any:
    """A bar of tqdm (in a notebook its widget), for a `with` block; without `shown` it counts and shows nothing.

    `done` units of the total were there before: the bar begins behind them, and its rate and the time left count only what is
    done now. Bars go to the standard error, as those of other libraries do.
    """
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not shown, **options)
