"""Measure how far a token's other experts make up for one: each expert's contribution against the rest of the routed sum.

    hooked-moe redistribution
    hooked-moe redistribution --model qwen1.5-moe --corpus wikitext-2 --layers 0,6,12,18,23
    hooked-moe redistribution --model qwen1.5-moe --corpus wikitext-2 --protocol as_released

Every token is paired with itself, and the gap norm is g ||E||: an identity, so its correlation with the routing weight g is
reported apart from correlations that are not identities. As released, rows of router and output belong to different tokens, and
no removal is measured. This command uses the measurement of `hooked-moe audit`, or makes it, and writes redistribution.csv.
Table 7, Figure 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import scipy

from hooked_moe.checks import quoted
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.cli.measured_run import analyse, open_run, share_ends
from hooked_moe.cli.options import add_measurement_arguments, parse_sample
from hooked_moe.cli.released_run import add_protocol_argument, open_released_run
from hooked_moe.tables import read_csv, write_derived

SHOWN = ("mean_gap_norm", "rho_weight_gap", "rho_weight_norm", "rho_gap_compensation", "rho_gap_alignment")


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("redistribution", __doc__)
    add_protocol_argument(parser)
    add_measurement_arguments(parser)
    parser.add_argument(
        "--positions",
        default="all",
        help="where experts are removed: all (default), or how many; redistribution reads all tokens",
    )
    args = parser.parse_args(arguments)
    return run_command(released_redistribution if args.protocol == "as_released" else redistribution, args)


def redistribution(args: argparse.Namespace) -> Path:
    """Aligned rows, from the clean run's observations; returns the run's directory."""
    with open_run(args) as run:
        run.require("position", parse_sample(args.positions, run.tokenized.valid_positions()), memory_budget=args.memory)
        if share_ends(run):
            return run.directory
        analyse(run)
    print_redistribution(read_csv(run.directory / "redistribution.csv"))
    return run.directory


def released_redistribution(args: argparse.Namespace) -> Path:
    """The paper's pairing of rows, and the aligned one on the same texts; returns the run's directory."""
    if args.positions != "all":
        raise ValueError(f"--positions {quoted(args.positions)}: the released pairing is of all rows; leave it out")
    with open_released_run(args) as run:
        table = by_layer(run.redistribution())
        command = "hooked-moe redistribution --protocol as_released"
        write_derived(run.directory, "redistribution", {"redistribution.csv": table}, ["redistribution.parquet"], command)
    print_redistribution(table)
    return run.directory


def by_layer(experts: pa.Table) -> pa.Table:
    """Mean gap norm and Spearman correlations over a layer's experts, for each pairing."""
    rows = []
    keys = dict.fromkeys(zip(experts["layer"].to_pylist(), experts["pairing"].to_pylist(), strict=True))
    for layer, pairing in keys:
        own = [row for row in experts.to_pylist() if (row["layer"], row["pairing"]) == (layer, pairing)]
        weight, gap, compensation = (
            [row[name] for row in own] for name in ("routing_weight", "gap_norm", "relative_compensation")
        )
        rows.append(
            {
                "layer": layer,
                "pairing": pairing,
                "n_experts": len(own),
                "mean_gap_norm": sum(gap) / len(gap),
                "rho_weight_gap": float(scipy.stats.spearmanr(weight, gap).statistic),
                "rho_gap_compensation": float(scipy.stats.spearmanr(gap, compensation).statistic),
            }
        )
    return pa.Table.from_pylist(rows)


def print_redistribution(table: pa.Table) -> None:
    shown = [name for name in SHOWN if name in table.column_names]
    paired = "pairing" in table.column_names
    print("\nOver the experts of a layer: mean gap norm, and Spearman correlations")
    print("  layer " + ("pairing      " if paired else "") + " ".join(f"{name:>20}" for name in shown))
    for row in table.to_pylist():
        pairing = f"{row['pairing']:<12} " if paired else ""
        print(f"  {row['layer']:>5} {pairing}" + " ".join(f"{row[name]:>20.4f}" for name in shown))
