"""Fuzzing of the directories that measurements leave behind: a finished run is opened, required, analysed and reported again."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from hooked_moe.cli.measured_run import analyse
from hooked_moe.corpus import load_corpus
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.model import HookedMoE
from hooked_moe.report.figures.drawing import Drawing
from tests.fuzz.byte_mutations import mutate_bytes, mutate_file
from tests.fuzz.checkpoints import small_checkpoints
from tests.fuzz.json_mutations import dumps, mutate

_TEXTS = tuple(f"The whale number {i} swam past the ship, and the ship followed it." for i in range(3))
_WORDS = (
    "all",
    [0, 1],
    "position",
    {"positions": "all", "layers": [0, 1]},
    {"max_abs_nats": float("nan")},
    {"max_abs_nats": "x"},
    "1.0",
)
_WEIGHTS = {".json": 30, ".csv": 2, ".parquet": 4}
"""Of the kinds of files: what the JSON files say is believed by itself."""


class Results:
    name = "results"
    shown_by_console = False
    seconds = 60

    def prepare(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-results-"))
        (self.home / "model").mkdir()
        for name, data in small_checkpoints()[0].items():
            (self.home / "model" / name).write_bytes(data)
        (self.home / "text.txt").write_text("\n\x1e\n".join(_TEXTS), encoding="utf-8")
        self.model = HookedMoE.from_pretrained(self.home / "model")
        self.tokenized = TokenizedCorpus(self.model, load_corpus(str(self.home / "text.txt")), 12, 12)
        with self._opened(self.home / "results") as run:
            self._finish(run)
            self.place = run.directory.relative_to(self.home / "results")
        directory = self.home / "results" / self.place
        files = [file for file in directory.rglob("*") if file.is_file() and file.name != "writer.lock"]
        ordered = sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))  # so that copies age alike
        self.files = {str(file.relative_to(directory)): file.read_bytes() for file in ordered}

    def write(self, rng: random.Random, directory: Path) -> str:
        run = directory / self.place
        (run / "figures").mkdir(parents=True)
        for name, data in self.files.items():
            (run / name).write_bytes(data)
        name = rng.choice([name for name in self.files for _ in range(_WEIGHTS.get(Path(name).suffix, 1))])
        if rng.random() < 0.1:
            return mutate_file(run / name, rng)
        if name.endswith(".json") and rng.random() < 0.8:
            written = json.loads(self.files[name])
            value, what = mutate(written, rng, _WORDS)
            if dumps(value) != dumps(written):  # what says the same stays as it was laid out: files are known by their bytes
                (run / name).write_bytes(dumps(value))
        else:
            data, what = mutate_bytes(self.files[name], rng)
            (run / name).write_bytes(data)
        return f"{name}: {what}"

    def run(self, directory: Path) -> str:
        with self._opened(directory) as run:
            self._finish(run)
        after = {name: directory / self.place / name for name in self.files}
        other = [name for name, file in after.items() if not file.is_file() or not _is_same(file.read_bytes(), self.files[name])]
        return f"finished, with other contents: {', '.join(other)}" if other else ""

    def _opened(self, results: Path) -> Run:
        return open_measurement(self.model, self.tokenized, results=results)

    def _finish(self, run: Run) -> None:
        run.require("position", progress=False)
        with mock.patch.object(Drawing, "render", _empty_pictures):
            analyse(run)


def _empty_pictures(drawing: Drawing, *kinds: str, **options: Any) -> dict[str, bytes]:
    """In place of figures, which take longer than all else and are checked as other files are."""
    return {kind: f"{drawing.name}.{kind}".encode() for kind in kinds}


def _is_same(data: bytes, written: bytes) -> bool:
    """Whether two files say the same: JSON may be laid out in another way."""
    if data == written:
        return True
    try:
        first, second = (json.dumps(json.loads(content), sort_keys=True) for content in (data, written))
    except ValueError:
        return False
    return first == second
