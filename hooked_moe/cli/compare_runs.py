"""Put two audits side by side: what differs between them, and which differences in savings their documents bear out.

    hooked-moe compare-runs results/tiny-olmoe/held-out-1f086e18 results/tiny-mixtral/held-out-0b5f3c2d
    hooked-moe compare-runs RUN OTHER_RUN --out comparisons/olmoe-against-mixtral

Two models on one corpus, one model on two corpora, two kinds of removal: any two directories of `hooked-moe audit`. Where
both read the same documents, differences are paired over them. Nothing is measured again, and no model is loaded. Writes
comparison.html and comparison.csv. (`hooked-moe compare` is something else: it puts runs beside the tables of arXiv
2606.10703.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hooked_moe.analysis.compared_run import read_compared_run
from hooked_moe.analysis.run_comparison import compare_runs
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.report.comparison_page import write_comparison
from hooked_moe.report.terminal_comparison import terminal_comparison


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("compare-runs", __doc__)
    parser.add_argument("first", type=Path, help="the directory of a run, results/<model>/<run>")
    parser.add_argument("second", type=Path, help="that of another; differences are first less second")
    parser.add_argument("--out", type=Path, help="directory for the page (default: results/comparisons/<first>--<second>)")
    return run_command(compare, parser.parse_args(arguments), resumes=False)


def compare(args: argparse.Namespace) -> Path:
    """The directory of the page. Raises `ValueError` and `OSError` that say what to do, for what cannot be compared."""
    first, second = read_compared_run(args.first), read_compared_run(args.second)
    found = compare_runs(first, second)
    name = "--".join(run.name.replace("/", ".") for run in found.runs)
    directory: Path = args.out or Path("results") / "comparisons" / name
    page = write_comparison(found, directory)
    print(f"{terminal_comparison(found)}\npage: {page}")
    return directory
