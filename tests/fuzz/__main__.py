"""Fuzz what the package reads, and write the counts of outcomes to benchmarks/FUZZ.md.

    make fuzz                                              # 2,000 inputs of each kind
    make fuzz ARGS="--inputs 25000 --seed 7"               # more, from another seed
    make fuzz ARGS="--targets checkpoints --seed 7 --only 123"   # one input again, here, with its traceback

Inputs are valid files whose structure or bytes were mutated. Each is determined by its kind, the seed and its number. The exit
code is 1 if any did not end right or in an error that answers.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RUST_BACKTRACE", "0")

import torch

from hooked_moe.checks import printable
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.corpora import Corpora
from tests.fuzz.judge import BAD, GOOD, ROOT, judged
from tests.fuzz.options import Options
from tests.fuzz.pool import Result, make_input, run_inputs
from tests.fuzz.results import Results
from tests.fuzz.target import Target

TARGETS: dict[str, type[Target]] = {"checkpoints": Checkpoints, "corpora": Corpora, "options": Options, "results": Results}
REPORT = ROOT / "benchmarks" / "FUZZ.md"
PREAMBLE = """# Fuzzing

Every `make fuzz` of 1,000 inputs or more adds a row for each kind of input, with the commit that it was run at. Inputs are valid
files, mutated in structure or bytes; each is determined by its kind, seed and number. "right" means loaded, run and as it should
be; a named error says what was wrong in the package's words. Limits: 10 s of processor time (result directories: 60, for they are
analysed again), and 200 MB beyond the input's size.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each kind at most; what was run by then is counted")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--only", type=int, metavar="K", help="run input K alone, in this process, and keep its files")
    parser.add_argument("--report", type=Path, help=f"where counts go (default: {REPORT.relative_to(ROOT)})")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    failures: list[Result] = []
    rows = []
    for name in args.targets:
        target = TARGETS[name]()
        target.prepare()
        if args.only is not None:
            replay(target, args.seed, args.only)
            continue
        started = time.perf_counter()
        counts: collections.Counter[str] = collections.Counter()
        for result in run_inputs(target, args.seed, range(args.inputs), args.workers):
            counts[result.outcome] += 1
            if result.outcome in BAD:
                failures.append(result)
                again = f"{name} --seed {result.seed} --only {result.number}"
                print(f"{again}: {result.outcome}: {result.detail}\n    {result.mutation}", flush=True)
            if time.perf_counter() - started > 60 * args.minutes:
                break
        rows.append((name, args.seed, counts))
        print(f"{name}: {dict(counts)}, {time.perf_counter() - started:.0f} s", flush=True)
    report = args.report or (REPORT if args.inputs >= 1000 else None)
    if rows and report is not None:
        earlier = report.read_text(encoding="utf-8") if report.is_file() else ""
        report.write_text(as_markdown(earlier, rows, failures), encoding="utf-8")
    return int(bool(failures))


def replay(target: Target, seed: int, number: int) -> None:
    """One input again, in this process; its files stay."""
    directory = Path(tempfile.mkdtemp(prefix=f"fuzz-{target.name}-{seed}-")) / str(number)
    print(make_input(target, seed, number, directory))
    print(f"{directory}\n{': '.join(judged(target, directory))}")
    target.run(directory)


def as_markdown(earlier: str, rows: list[tuple[str, int, collections.Counter[str]]], failures: list[Result]) -> str:
    """The counts of all runs so far as a table, the latest last, and the inputs of the latest that failed."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT)
    commit = described.stdout.strip() or "unknown"
    outcomes = (*GOOD, *BAD)
    head = f"| kind | commit | seed | inputs | {' | '.join(outcomes)} |"
    lines = [PREAMBLE, head, f"|---|---|---|---|{'---|' * len(outcomes)}"]
    lines += [line for line in earlier.splitlines() if line.startswith("| ") and not line.startswith("| kind ")]
    for name, seed, counts in rows:
        numbers = [counts.total(), *(counts[outcome] for outcome in outcomes)]
        lines.append(f"| {name} | {commit} | {seed} | {' | '.join(f'{number:,}' for number in numbers)} |")
    if failures:
        lines.append("\nThese failed in the latest; `--targets KIND --seed S --only K` runs one again:\n")
        lines += [f"- {f.target}, {f.seed}, {f.number}: {f.outcome}: `{printable(f.detail)}`" for f in failures[:200]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
