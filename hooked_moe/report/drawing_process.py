"""The figures of a run's page, drawn by this process and another.

Drawing is most of what a report takes, and matplotlib lets no second thread work meanwhile. The other process reads the run's
tables for itself. Both claim the figures that are left one by one, this one from the first on and the other from the last, so
that neither waits for long; what each draws has the same bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hooked_moe
from hooked_moe.report.figures.drawing import Drawing, Pictures
from hooked_moe.report.inputs import read_inputs
from hooked_moe.report.run_figures import run_drawings

PROCESSES = 2 if len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)) > 1 and sys.executable else 1
"""Two where there are processors for them."""


def draw_figures(run: Path, drawings: Sequence[Drawing], done: Callable[[int], object]) -> dict[str, Pictures]:
    """Write all drawings of a run into its figures/; returns each one's pictures. `done` is told how many more are finished.

    Raises RuntimeError, with what it said, where the other process ends with an error.
    """
    (run / "figures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hooked_moe_") as directory:
        claims = Path(directory)
        with _another_process(run, claims, start=PROCESSES > 1 and len(drawings) > 1):
            here = 0
            for _ in _draw_unclaimed(run, drawings, claims):
                done(1)
                here += 1
        done(len(drawings) - here)
        return {
            drawing.name: Pictures(
                (run / "figures" / f"{drawing.name}.svg").read_bytes(), _narrow(claims, drawing.name).read_bytes()
            )
            for drawing in drawings
        }


def _draw_unclaimed(run: Path, drawings: Iterable[Drawing], claims: Path) -> Iterator[str]:
    """Draw what no process has claimed; yields the name of each when it is drawn."""
    for drawing in drawings:
        try:
            (claims / drawing.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        _narrow(claims, drawing.name).write_bytes(drawing.save(run / "figures").narrow)
        yield drawing.name


def _narrow(claims: Path, name: str) -> Path:
    return claims / f"{name}.narrow.svg"


@contextmanager
def _another_process(run: Path, claims: Path, start: bool) -> Iterator[None]:
    """One that draws while the block runs, and has drawn all it claimed when the block ends."""
    if not start:
        yield
        return
    said = claims / "stderr"
    package = str(Path(hooked_moe.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", __name__, os.fspath(run.resolve()), os.fspath(claims)]
    with said.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=environment)
    try:
        yield
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code:
        raise RuntimeError(f"the process that draws figures of {run} ended with code {code}\n{said.read_text(errors='replace')}")


def main(arguments: Sequence[str]) -> None:
    run, claims = map(Path, arguments)
    for _ in _draw_unclaimed(run, reversed(run_drawings(read_inputs(run))), claims):
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
