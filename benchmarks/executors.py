"""The same audit in threads, and by workers on a Ray cluster: one command, and one flag.

    python -m benchmarks.executors                      # a cluster of this machine alone; minutes
    python -m benchmarks.executors --ray 10.0.0.1:6379 --workers 16
    python -m benchmarks.executors --layers 4           # DeepSeek-V2-Lite cut to 4 layers
    python -m benchmarks.executors --small              # seconds; shows that it works, measures nothing

`hooked-moe audit` runs from start to end in fresh processes, by turns, in threads and with `--ray`. The tables that both leave
have to be equal: "same tables" says how many have the same bytes, and by how much effects differ in the others (they do where
workers have other processors or more threads than this one). On one machine a cluster has nothing to win: the ratio is then what
Ray costs, its start and a copy of the model in every worker. The streamed model is random, of DeepSeek-V2-Lite's real widths;
threads share the work on one document of it, so that its workers are fewer and have as many processors as there are threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import checkpoints
from benchmarks.streaming import texts, write_texts
from benchmarks.tables import Table, count, parse, parser, show
from benchmarks.timing import ratio, seconds_of, summary

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"documents": 2, "tokens": 16, "layers": 2, "repeats": 1}
OF_STREAMED = 4
"""Documents at most: each costs a share of a pass over the weights."""
TOLERANCE = 1e-4
"""Between tables of different processors or threads."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    with tempfile.TemporaryDirectory() as directory:
        args.dir = Path(directory) / "model"
        args.dir.mkdir()
        cfg = checkpoints.deepseek_v2_lite(args.layers, args.small)
        checkpoints.write(cfg, args.dir)
        write_texts(cfg, argparse.Namespace(dir=args.dir, documents=min(args.documents, OF_STREAMED), tokens=args.tokens))
        rows = [cells for name, words in audits(args).items() for cells in compare(name, words, args)]
    tables = [
        Table(
            f"Whole audits in threads and with `--ray {args.ray}`: {count(args.threads, 'thread')}, "
            f"{count(args.workers, 'worker')} with a processor each, or {count(streaming_workers(args), 'worker')} with "
            f"{count(args.threads, 'processor')} where the model is streamed",
            f"{args.documents} documents of the shipped corpus, {args.tokens} tokens of each; of the streamed model, which has "
            f"DeepSeek-V2-Lite's widths in {args.layers} layers, {min(args.documents, OF_STREAMED)} documents of random tokens.",
            ["`hooked-moe audit`", "by", "time", "ratio", "same tables"],
            rows,
        )
    ]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(repeats=1)
    result.add_argument("--ray", default="auto", metavar="ADDRESS", help="as hooked-moe audit takes it (default: %(default)s)")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(default: one a processor, %(default)s)")
    result.add_argument("--model", default="tiny-olmoe", help="one that ships (default: %(default)s)")
    result.add_argument("--documents", type=int, default=72, help="(default: all, %(default)s)")
    result.add_argument("--tokens", type=int, default=128, help="of each document (default: %(default)s)")
    result.add_argument("--layers", type=int, default=3, help="of the streamed model (default: %(default)s)")
    return result


def audits(args: argparse.Namespace) -> dict[str, list[str]]:
    """Options of `hooked-moe audit`, by what a row calls them."""
    shipped = ["--model", args.model, "--documents", str(args.documents), "--tokens", str(args.tokens)]
    streamed = ["--model", str(args.dir), "--corpus", str(texts(args)), "--tokens", "all", "--stream", "--store", "bfloat16"]
    return {
        f"--model {args.model}": shipped,
        f"--model {args.model} --budget 5%": [*shipped, "--budget", "5%"],
        "--model (random) --stream --budget 5%": [*streamed, "--budget", "5%"],
    }


def streaming_workers(args: argparse.Namespace) -> int:
    """As many as have together the processors of `--workers`, each with one for every thread."""
    return max(1, args.workers // args.threads)


def compare(name: str, words: list[str], args: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each executor."""
    workers, processors = (streaming_workers(args), args.threads) if "--stream" in words else (args.workers, 1)
    of_ray = ["--ray", args.ray, "--ray-workers", str(workers), "--ray-cpus", str(processors)]
    flags = {"threads": [], f"--ray {args.ray}": of_ray}
    seconds: dict[str, list[float]] = {executor: [] for executor in flags}
    verdict = ""
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as results:
            places = [Path(results) / str(number) for number in range(len(flags))]
            for place, (executor, flag) in zip(places, flags.items(), strict=True):
                words_of_run = [*words, *flag, "--results", str(place), "--run", "run"]
                seconds[executor].append(seconds_of(partial(audit, words_of_run, args.threads)))
            verdict = same_tables(*(next(place.glob("*/run")) for place in places))
    for executor, own in seconds.items():
        peer = seconds["threads"]
        yield [f"`{name}`", f"`{executor}`", summary(own), ratio(own, peer), "" if own is peer else verdict]


def audit(words: list[str], threads: int) -> None:
    """Raises `RuntimeError` with what it said where it ends with an error."""
    command = [sys.executable, "-m", "hooked_moe", "audit", *words]
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}\n{done.stderr[-2000:]}")


def same_tables(one: Path, other: Path) -> str:
    """How many tables have the same bytes; of the others, how far their numbers are apart.

    Raises `ArithmeticError` where one of the two lacks a table, or they are further apart than rounding explains.
    """
    names = sorted(path.name for path in one.glob("*.parquet"))
    if names != sorted(path.name for path in other.glob("*.parquet")):
        raise ArithmeticError(f"{one} and {other} do not have the same tables")
    differing = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    largest = max((difference(one / name, other / name) for name in differing), default=0.0)
    if largest > TOLERANCE:
        raise ArithmeticError(f"{', '.join(differing)}: numbers differ by {largest:.2g}")
    return f"{len(names) - len(differing)} of {len(names)}" + (f"; others to {largest:.1e}" if differing else "")


def difference(one: Path, other: Path) -> float:
    """The largest between two tables' numbers; of a column with numbers above 1, as a share of the largest of them."""
    left, right = pq.read_table(one), pq.read_table(other)
    numbers = [name for name in left.column_names if left.schema.field(name).type in ("float", "double")]
    pairs = [(left[name].to_numpy(), right[name].to_numpy()) for name in numbers]
    scales = (max(1.0, float(np.nanmax(np.abs(a), initial=0.0))) for a, _ in pairs)
    return max(float(np.nanmax(np.abs(a - b), initial=0.0)) / scale for (a, b), scale in zip(pairs, scales, strict=True))


if __name__ == "__main__":
    main()
