"""Remove every routed expert at every token, one at a time, and ask what the routing statistics knew about it.

    python -m experiments.audit                                     # the shipped model on the shipped corpus
    python -m experiments.audit --model olmoe --corpus wikitext-2 --layers 0,4,7,11,15 --positions 200

Verify -> measure -> analyse -> report. Results go to results/<model>/<run>/: tables as parquet and csv, report.html with
figures, manifest.json. A killed run goes on where it stopped when the same command is given again, to the same bytes.
Protocol of arXiv 2606.10703 in its stated form: expert removed at the token only, output zeroed, routed experts only.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs as a script

from experiments.measuring import SEED, add_measurement_arguments, open_run, parse_sample
from hooked_moe.analysis import analyse_run
from hooked_moe.cell_text import terminal_table
from hooked_moe.criteria import CRITERIA
from hooked_moe.report import write_report
from hooked_moe.statistics import minimum_documents

SAMPLE_SIZE = 200


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measurement_arguments(parser)
    parser.add_argument("--positions", default="all", help="all (default), or how many to sample: the paper's sample is 200")
    parser.add_argument(
        "--scope", choices=["position", "both"], default="position", help="both: also remove experts sequence-wide"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a sign of the table shows "?"
    try:
        audit(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def audit(args: argparse.Namespace) -> Path:
    """The whole audit; returns the run's directory. Raises `ValueError` and `OSError` that say what to do."""
    started = time.perf_counter()
    with open_run(args) as run:
        valid = run.tokenized.valid_positions()
        sample = parse_sample(args.positions, valid)
        positions = valid if sample is None else sample
        removals = len(positions) * len(run.layers) * run.model.cfg.experts_per_token
        print(f"removals to measure: {removals:,}\nresults: {run.directory}")
        needed = minimum_documents(len(CRITERIA) * len(run.layers))
        if len({document for document, _ in positions}) < needed:
            print(f"note: tests over documents need {needed} or more of them and will be refused; those over positions are made")
        print()

        run.require("position", sample, memory_budget=args.memory)
        if args.scope == "both":
            run.require("sequence", sample, memory_budget=args.memory)

        cells = analyse_run(
            run.directory,
            n_experts=run.model.cfg.num_experts,
            layers=run.layers,
            n_positions=min(SAMPLE_SIZE, len(positions)),
            seed=SEED,
        )
        report = write_report(run.directory)
    print(terminal_table(cells))
    print(f"\n{removals:,} removals; {time.perf_counter() - started:.0f} s in all\nreport: {report}")
    return run.directory


if __name__ == "__main__":
    sys.exit(main())
