"""Remove every routed expert at every token, one at a time, and ask what the routing statistics knew about it.

    hooked-moe audit                                     # the shipped model on the shipped corpus
    hooked-moe audit --model olmoe --corpus wikitext-2 --layers 0,4,7,11,15 --positions 200
    hooked-moe audit --model olmoe --corpus wikitext-2 --protocol as_released

It verifies, measures, analyses and reports. Results go to results/<model>/<run>/: tables as parquet and csv, report.html with
figures, manifest.json. A killed run resumes where it stopped when the same command is given again, and ends with the same bytes.
The protocol is that of arXiv 2606.10703 in its stated form: the expert is removed at the token only, its output is zeroed, and
only routed experts are removed. With --protocol as_released it is what the paper's code does, as hooked_moe.paper.protocols
tabulates it. Tables 1-3, Figure 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from hooked_moe.analysis.cells import cells_from_table, cells_table
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.cli.measured_run import analyse, open_run, share_ends
from hooked_moe.cli.options import add_measurement_arguments, parse_sample
from hooked_moe.cli.released_run import (
    add_protocol_argument,
    compare_positions,
    open_released_run,
    print_cells,
    released_positions,
    write_released_cells,
)
from hooked_moe.report.terminal_savings import terminal_savings
from hooked_moe.statistics import minimum_documents
from hooked_moe.tables import read_csv


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("audit", __doc__)
    add_protocol_argument(parser)
    add_measurement_arguments(parser)
    parser.add_argument(
        "--positions", default="all", help="all (default; as_released: 200), or how many to sample: the paper's sample is 200"
    )
    parser.add_argument(
        "--scope", choices=["position", "both"], default="position", help="both: also remove experts sequence-wide"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command(released_audit if args.protocol == "as_released" else audit, args)


def audit(args: argparse.Namespace) -> Path:
    """The whole audit; returns the run's directory. Raises `ValueError` and `OSError` that say what to do."""
    started = time.perf_counter()
    with open_run(args) as run:
        valid = run.tokenized.valid_positions()
        sample = parse_sample(args.positions, valid)
        positions = valid if sample is None else sample
        removals = len(positions) * len(run.layers) * run.model.cfg.experts_per_token
        print(f"removals to measure: {removals:,}\nresults: {run.directory}")
        needed = minimum_documents(len(PAPER_CRITERIA) * len(run.layers))
        if len({document for document, _ in positions}) < needed:
            print(f"note: tests over documents need {needed} or more of them and will be refused; those over positions are made")
        print()

        run.require("position", sample, memory_budget=args.memory)
        if args.scope == "both":
            run.require("sequence", sample, memory_budget=args.memory)
        if share_ends(run):
            return run.directory

        report = analyse(run)
        cells = cells_from_table(read_csv(run.directory / "cells.csv", cells_table([]).schema))
        savings = read_csv(run.directory / "savings.csv")
    print(terminal_savings(savings, cells))
    print(f"\n{removals:,} removals; {time.perf_counter() - started:.0f} s in all\nreport: {report}")
    return run.directory


def released_audit(args: argparse.Namespace) -> Path:
    """Four metrics and the control, by the paper's code; returns the run's directory."""
    n = released_positions(args.positions)
    with open_released_run(args) as run:
        run.experts()
        comparisons = run.audit(n)
        print_cells(write_released_cells(run, n, comparisons, run.control(n)))
        same = compare_positions(run, comparisons)
        if same is not None:
            print(same)
    return run.directory
