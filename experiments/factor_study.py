"""Which training choice makes an expert matter: 16 small models, each audited.

    python -m experiments.factor_study                          # all that is missing: train, audit, analyse
    python -m experiments.factor_study --stages train --seeds 0 1 2
    python -m experiments.factor_study --stages train --at-most 1   # one training, then stop
    python -m experiments.factor_study --steps 4200                 # the shipped models' length: 76 minutes of one core each
    python -m experiments.factor_study --stages train & python -m experiments.factor_study --stages train   # two share the runs
    python -m experiments.factor_study --ray auto --threads 4   # on a Ray cluster, a worker with four processors each

Every run is kept as it is made (its training state too), so that the same command resumes; runs come in an order whose every
beginning is as balanced as it can be. Stages: plan.csv, training, audits and responses.csv, and what `hooked-moe study factors`
makes of it. The responses that ship with the package are copied to hooked_moe/analysis/data/factor_responses.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import torch

from experiments.support.factor_audits import audit_run, responses_table
from experiments.support.factor_training import STEPS, is_trained, train_run
from experiments.support.factor_units import StudyTask
from hooked_moe.analysis.factors import DESIGN
from hooked_moe.cli.console import run_command, whole_number
from hooked_moe.cli.options import add_ray_arguments, executor_of
from hooked_moe.cli.study_factors import SHIPPED, analyse
from hooked_moe.executors import Executor, PlainWork
from hooked_moe.statistics.factorial import informative_order
from hooked_moe.tables import read_csv, write_csv_atomic

PlannedRun = tuple[int, int, dict[str, int]]
"""(seed, run, levels)"""
STAGES = ("plan", "train", "audit", "effects")


def planned_runs(seeds: list[int]) -> Iterator[PlannedRun]:
    """In the order in which they are made: all runs of a seed before the next."""
    levels = DESIGN.levels()
    for seed in seeds:
        for run in informative_order(levels):
            yield seed, run, {name: int(level) for name, level in zip(DESIGN.factors, levels[run], strict=True)}


def run_name(seed: int, run: int) -> str:
    return f"run-{run:02}-seed-{seed}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument(
        "--steps",
        type=whole_number,
        default=STEPS,
        help="of every training, each of 4,096 tokens (default: %(default)s, of which the shipped responses are)",
    )
    parser.add_argument(
        "--out", type=Path, help="where runs are kept (default: build/factors; of other --steps N build/factors-N-steps)"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--known", type=Path, help="responses of runs that need not be made again (default: shipped; of other --steps none)"
    )
    parser.add_argument("--at-most", type=int, metavar="N", help="train N models, then stop")
    parser.add_argument("--threads", type=int, default=1, help="of every run (default: %(default)s)")
    add_ray_arguments(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    return run_command(study, args)


def study(args: argparse.Namespace) -> None:
    """The stages asked for, in order."""
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: half of the models begin with as many steps of a dense one: give 2 or more")
    executor, shipped = executor_of(args), args.steps == STEPS
    args.out = args.out or Path("build/factors" if shipped else f"build/factors-{args.steps}-steps")
    responses = args.known or (SHIPPED if shipped else None)
    planned, known = list(planned_runs(args.seeds)), {} if responses is None else known_rows(responses)
    missing = [run for run in planned if run[:2] not in known]
    args.out.mkdir(parents=True, exist_ok=True)
    if "plan" in args.stages:
        write_csv_atomic(
            pa.Table.from_pylist([{"seed": seed, "run": run, **levels} for seed, run, levels in planned]), args.out / "plan.csv"
        )
    if "train" in args.stages and executor is not None:
        untrained = [run for run in missing if not is_trained(args.out / run_name(*run[:2]), args.steps)]
        do_elsewhere(executor, "train", untrained[: args.at_most], args)
    elif "train" in args.stages:
        tokens = np.load(args.corpus / "train.npy", mmap_mode="r", allow_pickle=False)
        train_missing(missing, tokens, args.out, args.at_most, args.steps)
    if "audit" in args.stages:
        rows: list[dict[str, Any]] = []
        if executor is not None:
            trained = [run for run in missing if is_trained(args.out / run_name(*run[:2]), args.steps)]
            do_elsewhere(executor, "audit", trained, args)
        for seed, run, levels in planned:
            directory = args.out / run_name(seed, run)
            if (seed, run) in known:
                rows += known[seed, run]
            elif is_trained(directory, args.steps):
                rows += audit_run(levels, seed, run, directory, args.corpus / "tokenizer.json")
        if not rows:
            raise ValueError(f"no run in {args.out} is trained yet: the stage train comes before audit")
        write_csv_atomic(responses_table(rows), args.out / "responses.csv")
        print(f"{args.out / 'responses.csv'}: {len({(row['run'], row['seed']) for row in rows})} runs")
    if "effects" in args.stages:
        analyse(args.out / "responses.csv", args.out / "report")


def known_rows(responses: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The rows of every (seed, run) in a table of responses; none where there is no such file."""
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in read_csv(responses).to_pylist() if responses.is_file() else []:
        rows.setdefault((row["seed"], row["run"]), []).append(row)
    return rows


def do_elsewhere(executor: Executor, stage: str, runs: list[PlannedRun], args: argparse.Namespace) -> None:
    """Train or audit these runs where the executor says."""
    task = StudyTask(stage, args.out.resolve(), args.corpus.resolve(), args.threads, args.steps)
    units = [(run_name(seed, run), seed, run, levels) for seed, run, levels in runs]
    for name, *_ in executor.run(PlainWork(task), units):
        print(f"{name}: {stage} done", flush=True)


def train_missing(planned: list[PlannedRun], tokens: np.ndarray, out: Path, at_most: int | None, steps: int) -> None:
    """Train what is not trained yet, but for the runs that another process is at: several may share the work."""
    made = 0
    for seed, run, levels in planned:
        directory = out / run_name(seed, run)
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / "train.lock")
        if made == at_most:
            return
        try:
            with lock.acquire(timeout=0):
                if not is_trained(directory, steps):
                    train_run(levels, seed, tokens, directory, steps)
                    made += 1
        except filelock.Timeout:
            print(f"{directory.name} is being trained by another process")


if __name__ == "__main__":
    sys.exit(main())
