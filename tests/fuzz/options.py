"""Fuzzing of command lines: every option that says what is measured, up to where an audit would begin to measure."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

from hooked_moe.cli import audit
from hooked_moe.cli.measured_run import open_run
from hooked_moe.cli.options import parse_sample
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
    "--scope": ("position", "both"),
    "--corpus": ("held-out", "wikitext-2", "nothing.jsonl", "/dev"),
    "--model": ("tiny-olmo", "/", "config.json"),
    "--protocol": ("defined", "as_released"),
    "--nothing": ("x",),
}
_FLAGS = ("--stream", "--bos", "--no-bos", "--", "-h", "--version", "-x")


class Options:
    name = "options"
    shown_by_console = True
    seconds = 10

    def prepare(self) -> None:
        self.checkpoint = small_checkpoints()[0]

    def write(self, rng: random.Random, directory: Path) -> str:
        (directory / "model").mkdir()
        for name, data in self.checkpoint.items():
            (directory / "model" / name).write_bytes(data)
        (directory / "text.txt").write_text("The whale swam past the ship.\n\x1e\nThe ship followed the whale.\n")
        chosen = {"--model": "MODEL", "--corpus": "TEXT", "--results": "RESULTS"}
        for option in rng.sample(list(_VALUES), rng.choice((1, 1, 2, 4))):
            hostile = str(rng.choice((*STRINGS, *NUMBERS, "--", "-1", "9" * 400, "9" * 5000)))
            chosen[option] = rng.choice(_VALUES[option]) if rng.random() < 0.5 else hostile
        line = [f"{key}={value}" if rng.random() < 0.5 else [key, value] for key, value in chosen.items()]
        flat = [part for item in line for part in ([item] if isinstance(item, str) else item)]
        if rng.random() < 0.2:
            flat.insert(rng.randrange(len(flat) + 1), rng.choice(_FLAGS))
        (directory / "arguments.json").write_text(json.dumps(flat))
        return str(flat)[:400]

    def run(self, directory: Path) -> str:
        places = {"MODEL": str(directory / "model"), "TEXT": str(directory / "text.txt"), "RESULTS": str(directory / "results")}
        arguments = json.loads((directory / "arguments.json").read_text())
        for key, place in places.items():
            arguments = [argument.replace(key, place) for argument in arguments]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(directory):
            try:
                args = audit.parse_arguments(arguments)
            except SystemExit as ended:
                harmless = said.getvalue().replace("\n", "").isprintable()
                return "" if ended.code in (0, 2) and harmless else f"exit code {ended.code}, with {said.getvalue()[-200:]!r}"
            with open_run(args) as run:
                parse_sample(args.positions, run.tokenized.valid_positions())
        return ""
