"""Remove one, two, ... all active experts at one token: how the loss changes, in which order of removal.

    hooked-moe progressive
    hooked-moe progressive --model olmoe --corpus wikitext-2 --layers 0,1,7,8,9,15
    hooked-moe progressive --model olmoe --corpus wikitext-2 --layers 0,1,7,8,9,15 --protocol as_released

The orders are falling and rising routing weight, and random: the paper's text compares with a random order that its code does not
run. Writes progressive.csv: mean, median and 95th percentile with intervals. Tables 8-9.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.progressive import progressive_table
from hooked_moe.cli.console import int_or_none, parser_of, run_command
from hooked_moe.cli.measured_run import analyse, open_run, share_ends
from hooked_moe.cli.options import add_measurement_arguments, parse_sample
from hooked_moe.cli.released_run import add_protocol_argument, open_released_run, released_positions
from hooked_moe.paper.protocols import RELEASED
from hooked_moe.tables import write_derived

POSITIONS = 500


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("progressive", __doc__)
    add_protocol_argument(parser)
    add_measurement_arguments(parser)
    parser.add_argument(
        "--positions", default=str(POSITIONS), help="how many to sample (default: %(default)s, as the paper), or all"
    )
    args = parser.parse_args(arguments)
    return run_command(released_progressive if args.protocol == "as_released" else progressive, args)


def progressive(args: argparse.Namespace) -> Path:
    """Three orders at one token; returns the run's directory."""
    with open_run(args) as run:
        valid = run.tokenized.valid_positions()
        number = int_or_none(args.positions)
        positions = "all" if number is not None and number >= len(valid) else args.positions
        run.require("progressive", parse_sample(positions, valid), memory_budget=args.memory)
        if share_ends(run):
            return run.directory
        table = progressive_table(run.directory / "progressive.parquet")
        if run.has("position"):
            print(f"report: {analyse(run)}")  # with progressive.csv
        else:
            write_progressive(run.directory, table, "progressive.parquet")
    print_progressive(table)
    return run.directory


def released_progressive(args: argparse.Namespace) -> Path:
    """The paper's code: falling weight, from the whole text; returns the run's directory."""
    protocol = RELEASED["olmoe"].progressive
    assert protocol is not None
    n = released_positions(args.positions, protocol.positions)
    with open_released_run(args) as run:
        table = summarise(run.progressive(n))
        write_progressive(run.directory, table, f"progressive-{n}.parquet", " --protocol as_released")
    print_progressive(table)
    return run.directory


def write_progressive(directory: Path, table: pa.Table, measured: str, options: str = "") -> None:
    write_derived(directory, "progressive", {"progressive.csv": table}, [measured], f"hooked-moe progressive{options}")


def summarise(removals: pa.Table) -> pa.Table:
    """Mean, median and 95th percentile of the released removals, by layer and number removed."""
    layer, removed, delta = (removals[name].to_numpy() for name in ("layer", "removed", "delta_loss"))
    rows = []
    for one in np.unique(layer):
        for count in np.unique(removed):
            values = delta[(layer == one) & (removed == count)]
            row = {"layer": int(one), "order": "descending", "removed": int(count), "n_positions": len(values)}
            quantiles = {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
            rows.append(row | {"mean": float(values.mean())} | quantiles)
    return pa.Table.from_pylist(rows)


def print_progressive(table: pa.Table) -> None:
    rows = table.to_pylist()
    counts = sorted({row["removed"] for row in rows})
    print(
        f"\nMean loss change in nats by number of experts removed ({rows[0]['n_positions']} positions), and the last's quantiles"
    )
    print("  layer order      " + " ".join(f"{count:>7}" for count in counts) + "    median     p95")
    for key in dict.fromkeys((row["layer"], row["order"]) for row in rows):
        own = {row["removed"]: row for row in rows if (row["layer"], row["order"]) == key}
        means = " ".join(f"{own[count]['mean']:>+7.3f}" for count in counts)
        last = own[counts[-1]]
        print(f"  {key[0]:>5} {key[1]:<10} {means}   {last['median']:>+7.3f} {last['p95']:>+7.3f}")
