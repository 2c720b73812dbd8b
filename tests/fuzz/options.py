"""Fuzzing of command lines: every option of the commands that measure a run, up to where they would begin to measure."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from hooked_moe.cli import audit, control, progressive, prune, redistribution
from hooked_moe.measurement import Run
from hooked_moe.paper.run import ReleasedRun
from tests.fuzz.checkpoints import small_checkpoints
from tests.fuzz.json_mutations import NUMBERS, STRINGS

_VALUES = {
    "--layers": ("all", "0", "0,1", "1,1", "1,0", ",", "0-1", "2"),
    "--removal": ("zero", "renormalize", "reroute", "mean"),
    "--context": ("8", "16", "32", "33", "7"),
    "--tokens": ("8", "24", "all", "7", "\u0663\u0662", "\u00b2", "8.0", "1e1", " 8"),
    "--documents": ("1", "2", "3"),
    "--dtype": ("float32", "bfloat16", "float16", "int8"),
    "--memory": ("4GB", "512MiB", "1", "garbage", ".5 kb", "1e9", "inf", "-1", "4 G B"),
    "--device": ("cpu", "cuda", "cuda:99", "hpu", "meta", "mps", "cpu:1", "cpu:-1", "mkldnn", "xla"),
    "--revision": ("main",),
    "--run": ("a", ".", "..", "a/b", "a b", "-a"),
    "--positions": ("all", "3", "5", "2"),
    "--corpus": ("held-out", "wikitext-2", "nothing.jsonl", "/dev"),
    "--model": ("tiny-olmo", "/", "config.json"),
    "--protocol": ("defined", "as_released"),
    "--nothing": ("x",),
}
_COMMANDS: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "audit": (audit, {"--scope": ("position", "both")}),
    "control": (control, {}),
    "progressive": (progressive, {}),
    "redistribution": (redistribution, {}),
    "prune": (
        prune,
        {
            "--shares": ("0.5", "0", "1", "-0.1", "nan", "inf", "1e-320", "0.25 0.5"),
            "--criteria": ("reap", "rep", "random-0", "random-99999", "oracle"),
            "--random": ("1", "0", "1000", "1001"),
            "--per": ("layer", "model"),
            "--evaluate": ("1", "2", "3", "100"),
            "--evaluate-tokens": ("1", "2", "64"),
            "--save": ("pruned", "/", "model"),
            "--criterion": ("reap", "rep"),
        },
    ),
}
"""The module of each command, and its own options."""
_FLAGS = ("--stream", "--bos", "--no-bos", "--", "-h", "--version", "-x")


class Options:
    name = "options"
    shown_by_console = True
    seconds = 10

    def prepare(self) -> None:
        self.checkpoint = small_checkpoints()[0]

    def write(self, rng: random.Random, directory: Path) -> str:
        command = rng.choice(list(_COMMANDS))
        values = {option: known for option, known in _VALUES.items() if command != "prune" or option != "--positions"}
        values |= _COMMANDS[command][1]
        (directory / "model").mkdir()
        for name, data in self.checkpoint.items():
            (directory / "model" / name).write_bytes(data)
        (directory / "text.txt").write_text("The whale swam past the ship.\n\x1e\nThe ship followed the whale.\n")
        chosen = {"--model": "MODEL", "--corpus": "TEXT", "--results": "RESULTS"}
        for option in rng.sample(list(values), rng.choice((1, 1, 2, 4))):
            hostile = str(rng.choice((*STRINGS, *NUMBERS, "--", "-1", "9" * 400, "9" * 5000)))
            chosen[option] = rng.choice(values[option]) if rng.random() < 0.5 else hostile
        line = [f"{key}={value}" if rng.random() < 0.5 else [key, value] for key, value in chosen.items()]
        flat = [part for item in line for part in ([item] if isinstance(item, str) else item)]
        if rng.random() < 0.2:
            flat.insert(rng.randrange(len(flat) + 1), rng.choice(_FLAGS))
        (directory / "arguments.json").write_text(json.dumps([command, *flat]))
        return f"{command} {flat}"[:400]

    def run(self, directory: Path) -> str:
        places = {"MODEL": str(directory / "model"), "TEXT": str(directory / "text.txt"), "RESULTS": str(directory / "results")}
        command, *arguments = json.loads((directory / "arguments.json").read_text())
        for key, place in places.items():
            arguments = [argument.replace(key, place) for argument in arguments]
        said = io.StringIO()
        module = _COMMANDS[command][0]
        with contextlib.ExitStack() as block:
            for target, name, instead in (
                (module, "run_command", _judged_here),
                (Run, "require", _begin),
                (ReleasedRun, "_part", _begin),
            ):
                block.enter_context(mock.patch.object(target, name, instead))
            block.enter_context(contextlib.redirect_stderr(said))
            block.enter_context(contextlib.redirect_stdout(io.StringIO()))
            block.enter_context(contextlib.chdir(directory))
            try:
                module.main(arguments)
            except _MeasurementBegins:
                return ""
            except SystemExit as ended:
                harmless = said.getvalue().replace("\n", "").isprintable()
                return "" if ended.code in (0, 2) and harmless else f"exit code {ended.code}, with {said.getvalue()[-200:]!r}"
        return "the command ended before it measured anything"


class _MeasurementBegins(Exception):
    """All options were accepted."""


def _begin(*arguments: Any, **options: Any) -> NoReturn:
    raise _MeasurementBegins


def _judged_here(work: Callable[[Any], object], args: Any, resumes: bool = True) -> int:
    """In place of the console, which would turn every error into an exit code."""
    work(args)
    return 0
