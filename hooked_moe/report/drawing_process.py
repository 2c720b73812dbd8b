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
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import hooked_moe
from hooked_moe.report.figures.drawing import Drawing, Pictures
from hooked_moe.report.inputs import read_inputs
from hooked_moe.report.run_figures import run_drawings

PROCESSES = 2 if len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)) > 1 and sys.executable else 1
"""Two where there are processors for them."""


class DrawingHelper:
    """The other process, until the end of a `with` block.

        with DrawingHelper() as helper:
            helper.start()
            analyse_run(run, n_experts=64)
            helper.draw(run)
            write_report(run, helper=helper)

    It takes a second to start: begin before there is anything to draw. Without `start`, `draw` starts it.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="hooked_moe_")
        self.claims = Path(self._directory.name)
        """Where both processes say which figures they draw, and leave what the page needs of them."""
        self._said = self.claims / "stderr"
        self._run: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DrawingHelper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            if self._run is None or error is not None:
                self._process.kill()
            self._process.communicate()  # what it has begun to draw, it ends
        self._directory.cleanup()

    def start(self) -> None:
        """Start it, where there are processors for it, unless it was started."""
        if PROCESSES == 1 or self._process is not None:
            return
        package = str(Path(hooked_moe.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
        command = [sys.executable, "-P", "-m", __name__, os.fspath(self.claims)]
        with self._said.open("wb") as stderr:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr, env=environment)

    def draw(self, run: Path) -> None:
        """From now on it draws figures of the run, whose tables are all there, the last first. More than once has no effect."""
        self.start()
        if self._process is None or self._run is not None:
            return
        self._run = run
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as path:  # broken: it has ended, and `wait` says of what
            path.write(os.fsencode(run.resolve()))

    def wait(self) -> None:
        """Until all that it claimed is drawn. Raises RuntimeError, with what it said, where it ended with an error."""
        code = 0 if self._process is None or self._run is None else self._process.wait()
        if code:
            said = self._said.read_text(errors="replace")
            raise RuntimeError(f"the process that draws figures of {self._run} ended with code {code}\n{said}")


def draw_figures(
    run: Path, drawings: Sequence[Drawing], done: Callable[[int], object], helper: DrawingHelper
) -> dict[str, Pictures]:
    """Write all drawings of a run into its figures/; returns each one's pictures. `done` is told how many more are finished.

    Raises RuntimeError, with what it said, where the other process ends with an error.
    """
    (run / "figures").mkdir(exist_ok=True)
    if len(drawings) > 1:
        helper.draw(run)
    here = 0
    for _ in _draw_unclaimed(run, drawings, helper.claims):
        done(1)
        here += 1
    helper.wait()
    done(len(drawings) - here)
    figures = {drawing.name: run / "figures" / f"{drawing.name}.svg" for drawing in drawings}
    return {name: Pictures(wide.read_bytes(), _narrow(helper.claims, name).read_bytes()) for name, wide in figures.items()}


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


def main(arguments: Sequence[str]) -> None:
    """The other process: draws figures of the run whose path is its input, and nothing where that is empty."""
    (claims,) = map(Path, arguments)
    path = os.fsdecode(sys.stdin.buffer.read())
    if not path:
        return
    run = Path(path)
    (run / "figures").mkdir(exist_ok=True)
    for _ in _draw_unclaimed(run, reversed(run_drawings(read_inputs(run))), claims):
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
