"""Two thousand fuzzed inputs end right or in an error that answers; and the fuzzer sees what it is there to see."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch

from hooked_moe import HookedMoE
from tests.fuzz import pool
from tests.fuzz.__main__ import TARGETS, main
from tests.fuzz.judge import BAD, GOOD
from tests.fuzz.pool import run_inputs
from tests.fuzz.target import Target

IN_ORDINARY_TESTS = {"checkpoints": 700, "corpora": 1000, "options": 300}
"""Result directories are left to `make fuzz`: each takes an analysis."""


@pytest.mark.usefixtures("unchecked")  # as users run it
@pytest.mark.parametrize("name", IN_ORDINARY_TESTS)
def test_fuzzed_inputs_end_right_or_in_an_error_that_answers(name: str) -> None:
    target = TARGETS[name]()
    target.prepare()
    results = list(run_inputs(target, 1, range(IN_ORDINARY_TESTS[name]), workers=1))
    assert len(results) == IN_ORDINARY_TESTS[name]
    assert not [result for result in results if result.outcome not in GOOD]
    counts = Counter(result.outcome for result in results)
    assert min(counts[outcome] for outcome in GOOD) > len(results) / 20, (
        "nearly all inputs end alike: the mutations are too wild, or too tame"
    )


class Planted:
    """Does to its worker what the number of the input says."""

    name = "planted"
    shown_by_console = False
    seconds = 1.5
    kinds = ("right", "named error", "wrong", "internal error", "unreadable error", "panic", "abort", "memory", "hang")

    def prepare(self) -> None:
        pass

    def write(self, rng: random.Random, directory: Path) -> str:
        (directory / "file").write_bytes(b"x")
        return "planted"

    def run(self, directory: Path) -> str:
        match self.kinds[int(directory.name)]:
            case "named error":
                HookedMoE.from_pretrained(directory)
            case "wrong":
                return "it is wrong"
            case "internal error":
                int("x")
            case "unreadable error":
                (directory / "\x1b").touch()
                HookedMoE.from_pretrained(directory / "\x1b")
            case "panic":
                backend = tokenizers.Tokenizer(tokenizers.models.BPE())
                backend.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
                backend.encode("a b c d e f")
            case "abort":
                os.abort()
            case "memory":
                torch.ones(220 << 20, dtype=torch.uint8)
            case "hang":
                while True:
                    pass
        return ""


@pytest.mark.usefixtures("unchecked")
def test_every_way_to_fail_is_seen_and_the_next_input_runs() -> None:
    results = {result.number: result for result in run_inputs(Planted(), 0, range(len(Planted.kinds)), workers=1)}
    assert {number: results[number].outcome for number in sorted(results)} == dict(enumerate(Planted.kinds))
    assert set(Planted.kinds) == {*GOOD, *BAD}


def test_an_input_is_determined_by_its_numbers(tmp_path: Path) -> None:
    for name in IN_ORDINARY_TESTS:
        target: Target = TARGETS[name]()
        target.prepare()
        written = [
            pool.make_input(target, 3, number, tmp_path / f"{name}-{copy}-{number}") for copy in (0, 1) for number in range(5)
        ]
        assert written[:5] == written[5:]
        for number in range(5):
            first, second = (
                {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
                for directory in (tmp_path / f"{name}-{copy}-{number}" for copy in (0, 1))
            )
            assert first == second


@pytest.mark.usefixtures("unchecked")
def test_the_command_adds_its_counts_to_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "FUZZ.md"
    for seed in ("0", "4"):
        assert main(["--targets", "corpora", "--inputs", "20", "--seed", seed, "--report", str(report)]) == 0
    rows = [line.split(" | ") for line in report.read_text().splitlines() if line.startswith("| corpora")]
    assert [(row[2], row[3]) for row in rows] == [("0", "20"), ("4", "20")]
    assert capsys.readouterr().out.count("corpora: {") == 2
