"""The control: rank the active experts by per-token scores, and ask whether these tell which expert matters.

    hooked-moe control
    hooked-moe control --model olmoe --corpus wikitext-2 --layers 0,4,7,11,15 --positions 200
    hooked-moe control --model olmoe --corpus wikitext-2 --protocol as_released

Beside the paper's routing weight stands a ladder of scores that know more: the gap norm g ||E||, and the first-order estimate of
the loss change, without and with the softmax's curvature. This command uses the measurement of `hooked-moe audit`, or makes it,
and writes control.csv. Tables 4-6.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyarrow as pa

from hooked_moe.analysis.cells import Cell, cells_from_table, cells_table
from hooked_moe.analysis.control import weight_ratio_correlations
from hooked_moe.analysis.rankings import ROUTING_WEIGHT, TOKEN_LADDER
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.cli.measured_run import analyse, open_run, share_ends
from hooked_moe.cli.options import add_measurement_arguments, parse_sample
from hooked_moe.cli.released_run import (
    add_protocol_argument,
    open_released_run,
    print_cells,
    released_positions,
    write_released_cells,
)
from hooked_moe.report.number_text import p_value
from hooked_moe.report.outcome_words import PROTOCOL_WORDS
from hooked_moe.tables import read_csv, write_derived


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("control", __doc__)
    add_protocol_argument(parser)
    add_measurement_arguments(parser)
    parser.add_argument("--positions", default="all", help="all (default; as_released: 200), or how many to sample")
    args = parser.parse_args(arguments)
    return run_command(released_control if args.protocol == "as_released" else control, args)


def control(args: argparse.Namespace) -> Path:
    """The token's own scores in every layer; returns the run's directory."""
    with open_run(args) as run:
        run.require("position", parse_sample(args.positions, run.tokenized.valid_positions()), memory_budget=args.memory)
        if share_ends(run):
            return run.directory
        analyse(run)
        cells = cells_from_table(read_csv(run.directory / "cells.csv", cells_table([]).schema))
        positions = read_csv(run.directory / "positions.csv")
        sample = list(zip(positions["document"].to_pylist(), positions["position"].to_pylist(), strict=True))
        effects = run.directory / "effects.parquet"
        rho = {"sample": weight_ratio_correlations(effects, sample), "all": weight_ratio_correlations(effects)}
        table = control_table(cells, rho)
        inputs = ("cells.csv", "positions.csv", "effects.parquet")
        write_derived(run.directory, "control", {"control.csv": table}, inputs, "hooked-moe control")
    print_control(table)
    return run.directory


def control_table(cells: list[Cell], rho: dict[str, dict[int, tuple[float, int]]]) -> pa.Table:
    """A row per score, population and layer of scope position; `rho` is of the routing weight only."""
    names = ("ranking", "population", "layer", "n", "d_position", "d_position_low", "d_position_high", "p_t", "p_wilcoxon")
    rows = []
    for cell in cells:
        if cell.scope == "position" and cell.ranking in TOKEN_LADDER:
            row = {name: getattr(cell, name) for name in (*names, "outcome")}
            found = rho[cell.population].get(cell.layer) if cell.ranking == ROUTING_WEIGHT else None
            rows.append(row | {"rho_weight_ratio": float("nan") if found is None else found[0]})
    return pa.Table.from_pylist(rows)


def print_control(table: pa.Table) -> None:
    print("\nRemoving the active expert that the token's own score puts highest against lowest (scope position)")
    print("  population layer      d 95% interval         p_t     p_W    rho")
    ranking = None
    for row in table.to_pylist():
        if row["ranking"] != ranking:
            ranking = row["ranking"]
            print(TOKEN_LADDER[ranking])
        interval = f"[{row['d_position_low']:+.3f},{row['d_position_high']:+.3f}]"
        rho = f"{row['rho_weight_ratio']:+.3f}" if row["ranking"] == ROUTING_WEIGHT else "      "
        mark = PROTOCOL_WORDS[row["outcome"]].mark
        numbers = f"{row['d_position']:+.3f} {interval:<16} {p_value(row['p_t']):>7} {p_value(row['p_wilcoxon']):>7} {rho}"
        print(f"  {row['population']:<10} {row['layer']:>5} {numbers} {mark}")
    if any(math.isnan(row["d_position"]) for row in table.to_pylist()):
        print("nan: of too few documents, or too few positions, for a test over them")


def released_control(args: argparse.Namespace) -> Path:
    """The control by the paper's code; returns the run's directory."""
    n = released_positions(args.positions)
    with open_released_run(args) as run:
        print_cells(write_released_cells(run, n, run.control(n)))
    return run.directory
