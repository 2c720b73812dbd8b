"""Which training choice makes an expert matter: effects of seven factors on what an audit finds.

    hooked-moe study factors                              # the responses that ship with the package
    hooked-moe study factors --responses build/factors/responses.csv

The runs are small models of one architecture, trained for this: `python -m experiments.factor_study` in the repository plans,
trains and audits them. Written to --out: effects.csv, aliases.csv, report.html and figures/. The unit is the run of one seed.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from hooked_moe.analysis.factor_study import alias_table, effects_table, runs_in_hand
from hooked_moe.report.factor_page import write_factor_report
from hooked_moe.statistics import DegenerateSample
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
    """effects.csv, aliases.csv and the report of a table of responses; returns the report's path.

    With fewer runs than effects can be told apart by, the report shows the responses alone, and says so.
    """
    table = read_csv(responses)
    out.mkdir(parents=True, exist_ok=True)
    write_csv_atomic(table, out / "responses.csv")
    try:
        hand = runs_in_hand(table)
    except DegenerateSample as reason:
        print(f"{reason}: responses only")
        (out / "effects.csv").unlink(missing_ok=True)
        write_csv_atomic(alias_table(range(16)), out / "aliases.csv")
    else:
        write_csv_atomic(effects_table(table), out / "effects.csv")
        write_csv_atomic(alias_table(hand.runs), out / "aliases.csv")
    report = write_factor_report(out)
    print(f"report: {report}")
    return report
