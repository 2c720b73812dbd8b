"""Which training choice makes an expert matter: effects of seven factors on what an audit finds.

    hooked-moe study factors                              # the responses that ship with the package
    hooked-moe study factors --responses build/factors/responses.csv

The runs are small models of one architecture, trained for this: `python -m experiments.factor_study` in the repository plans,
trains and audits them. The unit is the run of one seed. Written to --out: effects.csv and aliases.csv, of the runs that count by
the rule that was written down before; where some do not, effects_all_runs.csv and aliases_all_runs.csv, a description of all
runs; report.html and figures/, every figure also as csv.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from hooked_moe.analysis.factor_study import ANY_ROUTED_PART, Analysis, analysed, some_do_not_count
from hooked_moe.report.factor_page import write_factor_report
from hooked_moe.tables import read_csv, write_csv_atomic

SHIPPED = Path(str(resources.files("hooked_moe.analysis").joinpath("data", "factor_responses.csv")))
"""Responses of the runs that were made so far."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", type=Path, help="responses.csv of a study (default: those that ship with the package)")
    parser.add_argument("--out", type=Path, default=Path("results/studies/factors"), help="where to write (default: %(default)s)")


def run(args: argparse.Namespace) -> Path:
    """The study from its responses; returns the report's path."""
    if args.responses is None and not SHIPPED.is_file():
        raise ValueError(
            "no responses ship with this version: give --responses, as `python -m experiments.factor_study` writes them"
        )
    return analyse(args.responses or SHIPPED, args.out)


def analyse(responses: Path, out: Path) -> Path:
    """Effects, aliases and the report of a table of responses; returns the report's path.

    Where the runs that count cannot tell the factors apart, the report says so first, and describes what there is.
    """
    table = read_csv(responses)
    out.mkdir(parents=True, exist_ok=True)
    write_csv_atomic(table, out / "responses.csv")
    for name in (f"{kind}{of}.csv" for kind in ("effects", "aliases") for of in ("", "_all_runs")):
        (out / name).unlink(missing_ok=True)
    counting = analysed(table)
    _write(counting, out, "")
    if counting.why_not:
        print(f"{counting.why_not}: no effect by the rule that was written down")
    if some_do_not_count(table):
        _write(analysed(table, ANY_ROUTED_PART), out, "_all_runs")
    report = write_factor_report(out)
    print(f"report: {report}")
    return report


def _write(analysis: Analysis, out: Path, of: str) -> None:
    if analysis.effects is not None:
        write_csv_atomic(analysis.effects, out / f"effects{of}.csv")
    write_csv_atomic(analysis.aliases, out / f"aliases{of}.csv")
