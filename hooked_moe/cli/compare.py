"""Put what was measured beside the published tables: ours, published, difference, for every run named or found.

    hooked-moe compare                              # every run of the shipped model
    hooked-moe compare --model olmoe
    hooked-moe compare results/OLMoE-1B-7B-0924/released-wikitext-2-1a2b3c4d
    hooked-moe compare --reread                     # and what the paper's released data say when pooled, in nats

Writes published.csv into each run's directory. Tables 1-9, Figures 1-2 (Figure 1 shows the d of Tables 1-6). With --reread, the
comparisons that the paper's authors released are pooled over layers and statistics: reread.csv under --results and in each run's
directory, where its report shows it. That takes no run, and no model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.loading.registry import locate
from hooked_moe.measurement.run_directory import write_access
from hooked_moe.paper.comparison import EXPERIMENTS, TABLES, ComparedValue, RunValues, compare, comparison_table, read_run
from hooked_moe.paper.published import published_model
from hooked_moe.paper.reread import POOLED, reread_table
from hooked_moe.report import write_report
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import p_value
from hooked_moe.report.reread import reread_sentences
from hooked_moe.tables import write_csv_atomic, write_derived


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("compare", __doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="directories of runs (default: all of --model under --results)")
    parser.add_argument("--model", default="tiny-olmoe", help="whose runs, where none are named (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results are (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="one line per table")
    parser.add_argument("--reread", action="store_true", help="also read the paper's released comparisons in nats, pooled")
    return run_command(compare_published, parser.parse_args(arguments))


def compare_published(args: argparse.Namespace) -> None:
    """Every run named, or found. Raises `ValueError` where there is none, unless --reread was asked for, which needs none."""
    directories = args.runs or runs_of(args.model, args.results)
    if not directories and not args.reread:
        home = args.results / Path(locate(args.model).model_name).name
        raise ValueError(f"there are no runs under {home}: run `hooked-moe audit` first, or name the directories of runs")
    for directory in directories:
        run = read_run(directory)
        compared = compare(run)
        print(heading(run))
        for name, why in run.left_out.items():
            print(f"  without {name}: {why}")
        if not compared:
            print(f"  the paper audited no model of type {run.model_type}")
            continue
        with write_access(directory):
            write_derived(
                directory, "published", {"published.csv": comparison_table(run, compared)}, TABLES, "hooked-moe compare"
            )
        for line in brief(compared) if args.brief else lines(compared):
            print(line)
    if args.reread:
        reread_released(directories, args.results)


def runs_of(model: str, results: Path) -> list[Path]:
    """The directories of a model's runs."""
    home = results / Path(locate(model).model_name).name
    return sorted(path.parent for path in home.glob("*/manifest.json"))


def reread_released(directories: Sequence[Path], results: Path) -> None:
    """reread.csv under `results` and in every directory, whose report is written again, and the table on the console."""
    table = reread_table()
    results.mkdir(parents=True, exist_ok=True)
    write_csv_atomic(table, results / "reread.csv")
    for directory in directories:
        with write_access(directory):
            write_derived(directory, "reread", {"reread.csv": table}, (), "hooked-moe compare --reread")
            if (directory / "report.html").is_file():
                write_report(directory)
    for line in reread_lines(table.to_pylist()):
        print(line)
    print(f"table: {results / 'reread.csv'}")


def reread_lines(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The pooled table, model by model, and what it says of each."""
    yield "\nThe paper's released comparisons, pooled: mean cost in nats of removing the expert ranked highest, and lowest"
    yield "  metric                           paragraphs    high     low  difference [95% interval]     p, sign flip  p, t-test"
    for model in dict.fromkeys(row["model"] for row in rows):
        yield model
        for row in (row for row in rows if row["model"] == model):
            metric = "all four" if row["metric"] == POOLED else label(row["metric"])
            costs = f"{row['high']:.4f}  {row['low']:.4f}"
            difference = f"{row['difference']:+.4f} [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
            tests = f"{p_value(row['p_sign_flip']):>11}  {p_value(row['p_t']):>9}"
            yield f"  {metric:<32} {row['n_paragraphs']:>10}  {costs}  {difference}  {tests}"
    yield from reread_sentences(rows)


def heading(run: RunValues) -> str:
    published = published_model(run.model_type)
    text = f"\n{run.directory} ({run.protocol})"
    if published is None or published.n_layers == run.n_layers:
        return text
    return f"{text}: not the published {published.name}; layers are matched by relative depth"


def lines(compared: list[ComparedValue]) -> Iterable[str]:
    """A line per published number, table by table; tables that were not measured in one line."""
    for table in EXPERIMENTS:
        own = [one for one in compared if one.published.table == table]
        if not own:
            continue
        if all(math.isnan(one.ours) for one in own):
            yield f"{table}: not measured; hooked-moe {EXPERIMENTS[table]}"
            continue
        yield f"{table}\n  layer (ours) what                                        ours | published | difference"
        for one in own:
            value = one.published
            removed = f"{value.ranking}, {value.removed} removed" if value.table in ("Table 8", "Table 9") else value.ranking
            what = f"{removed} {value.statistic}".strip()
            where = f"{value.layer:>5} ({'-' if one.layer is None else one.layer:>3})"
            yield f"  {where:<12} {what:<40} {_signed(one.ours)} |  {_signed(value.value)} |   {_signed(one.difference)}"


def brief(compared: list[ComparedValue]) -> Iterable[str]:
    """A line per table and statistic: how many numbers, and by how much they differ."""
    for table in EXPERIMENTS:
        for statistic in dict.fromkeys(one.published.statistic for one in compared if one.published.table == table):
            own = [one for one in compared if (one.published.table, one.published.statistic) == (table, statistic)]
            measured = [one for one in own if not math.isnan(one.ours)]
            if not measured:
                yield f"  {table:<8} {statistic:<20} not measured"
                continue
            ours, published = ([one.ours for one in measured], [one.published.value for one in measured])
            spans = " | ".join(f"{min(values):+.3f} to {max(values):+.3f}" for values in (ours, published))
            differ = sorted(abs(one.difference) for one in measured)[len(measured) // 2]
            yield f"  {table:<8} {statistic:<20} {len(measured):>2} of {len(own)}: {spans} | median difference {differ:.3f}"


def _signed(value: float) -> str:
    return "not run" if math.isnan(value) else f"{value:+7.3f}"
