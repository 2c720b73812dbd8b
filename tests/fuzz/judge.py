"""What an input came to: right, an error that answers, or one of the ways in which a program fails its users."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from types import TracebackType

from tests.fuzz.target import Target

ROOT = Path(__file__).parents[2]
PACKAGES = (str(ROOT / "hooked_moe"), str(ROOT / "weights_conversion"))
GOOD = ("right", "named error")
BAD = ("wrong", "internal error", "unreadable error", "panic", "abort", "hang", "memory")
MOST_BYTES = 200 * 10**6
"""Memory beyond the input's own size."""
MOST_CHARACTERS = 8_000
"""Of an error's message: a list of what does not fit may be long, a value from a file may not."""


def judged(target: Target, directory: Path) -> tuple[str, str]:
    """The outcome and what it was, for one input in this process. Never raises."""
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    reset_peak()
    before = memory("VmRSS")
    try:
        wrong = target.run(directory)
        outcome = ("wrong", wrong) if wrong else ("right", "")
    except MemoryError as error:
        outcome = ("memory", repr(error))
    except BaseException as error:
        outcome = _of_error(error, target)
    extra = memory("VmHWM") - before - size
    return ("memory", f"{extra / 1e6:.0f} MB beyond the input; {outcome[1]}") if extra > MOST_BYTES else outcome


def _of_error(error: BaseException, target: Target) -> tuple[str, str]:
    text, where = str(error), _place(error.__traceback__)
    described = f"{type(error).__name__} at {where}: {text[:300]!r}"
    if type(error).__module__ == "pyo3_runtime":
        return "panic", described
    if not isinstance(error, ValueError | OSError) or not _is_raised_here(error):
        return "internal error", described
    readable = len(text) <= MOST_CHARACTERS and text.replace("\n", "").isprintable()
    if not text.strip() or not (readable or target.shown_by_console):
        return "unreadable error", f"{len(text)} characters: {described}"
    return "named error", described


def _is_raised_here(error: BaseException) -> bool:
    """Whether a `raise` of the package made the error, or the operating system did and names the file."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) and error.filename is not None:
        return True
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGES)]
    return (
        bool(ours)
        and frames[-1] is ours[-1]
        and linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip().startswith("raise")
    )


def _place(trace: TracebackType | None) -> str:
    """The innermost line of the package."""
    ours = [frame for frame in traceback.extract_tb(trace) if frame.filename.startswith(PACKAGES)]
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "outside"


def memory(which: str) -> int:
    """Bytes of this process, by a name in /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(which + ":")[1].split()[0])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
