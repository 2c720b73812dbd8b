"""Remove experts for good by every ranking, and see what that costs, and whether the effect table had said so.

    hooked-moe prune                                                    # 12.5, 25 and 50% of every layer's experts
    hooked-moe prune --model tiny-qwen-moe --shares 0.25 --criteria reap weighted_ean
    hooked-moe prune --per model                                        # a budget for the whole model instead of each layer
    hooked-moe prune --criterion reap --shares 0.25 --save pruned-olmoe # the checkpoint, for transformers

Rankings are learned from the even documents of the run, and so are predictions: the sum of the single-token effects of the
experts removed. The loss is measured on the odd documents, with the experts and their router rows gone: the softmax is over those
that remain. The run is that of `hooked-moe audit` with the same options, measured first where it is not there. Writes pruning.csv
and pruning_summary.csv; every pruning is kept as it is measured, so that the same command resumes. --save takes all documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.pruning import ADDITIVE_SHARE, predict_pruning
from hooked_moe.analysis.pruning_orders import RANKINGS, TABLE, Pruning, PruningOrders, check_share, random_ranking, seed_of
from hooked_moe.analysis.pruning_table import PRUNING, MeasuredLosses, pruning_summary, pruning_table
from hooked_moe.analysis.summed_effects import SUMS_FILE
from hooked_moe.checks import unknown_name
from hooked_moe.cli.console import parser_of, run_command, whole_number
from hooked_moe.cli.measured_run import analyse, open_run, share_ends
from hooked_moe.cli.options import add_measurement_arguments
from hooked_moe.loading import save_pretrained
from hooked_moe.measurement import Run
from hooked_moe.measurement.pruned_losses import PrunedLosses
from hooked_moe.report import write_report
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import preset_share, share, signed
from hooked_moe.statistics import MINIMUM_PAIRS
from hooked_moe.surgery import remove_experts
from hooked_moe.tables import read_csv, write_derived

SHARES = (0.125, 0.25, 0.5)
TOKENS = 256
N_RANDOM, MOST_RANDOM = 5, 1000
INPUTS = ("effects.parquet", "routing.parquet", "expert_weights.parquet", SUMS_FILE)
"""What the rankings of a run, and the predictions, are learned from."""


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("prune", __doc__)
    add_measurement_arguments(parser)
    parser.add_argument(
        "--shares", nargs="+", type=float, default=list(SHARES), help="of the experts, to remove (default: .125 .25 .5)"
    )
    parser.add_argument(
        "--criteria", nargs="+", default=list(RANKINGS), metavar="NAME", help=f"some of {', '.join(RANKINGS)} (default: all)"
    )
    parser.add_argument(
        "--random", type=whole_number, default=N_RANDOM, metavar="N", help="masks at random (default: %(default)s)"
    )
    parser.add_argument(
        "--per", choices=["layer", "model"], default="layer", help="what the share is of: every layer (default), or the model"
    )
    parser.add_argument(
        "--evaluate",
        type=whole_number,
        metavar="N",
        help="measure on the first N odd documents, or more if others were (default: all)",
    )
    parser.add_argument(
        "--evaluate-tokens",
        type=whole_number,
        default=TOKENS,
        metavar="N",
        help="and the first N tokens of each (default: %(default)s)",
    )
    # Not `args.save`: nnsight, once it is imported, gives every object a method of that name, and argparse then sets no default.
    parser.add_argument(
        "--save", dest="save_to", type=Path, metavar="DIR", help="write the pruned model there, and measure nothing else"
    )
    parser.add_argument("--criterion", metavar="NAME", help="with --save: by which ranking")
    return run_command(prune, parser.parse_args(arguments))


def prune(args: argparse.Namespace) -> Path:
    """Prune and measure, or prune and save; returns the run's directory, or that of the model."""
    check_options(args)
    with open_run(args) as run:
        run.model.require_weights("pruning")
        check_sizes(run, args)
        if not run.has("position"):
            run.require("position", memory_budget=args.memory)
        if share_ends(run):
            return run.directory
        analyse(run)
        return save(run, args) if args.save_to else measure(run, args)


def check_options(args: argparse.Namespace) -> None:
    """Raises `ValueError` for options that do not go together, and for names that are not rankings."""
    if (args.save_to is None) != (args.criterion is None):
        raise ValueError("--save DIR and --criterion NAME go together: one says where to, the other by what")
    if args.save_to and len(args.shares) != 1:
        raise ValueError(f"--save writes one model: give one --shares, as in --shares 0.25, not {len(args.shares)}")
    for name in args.criteria if args.criterion is None else [args.criterion]:
        if name not in RANKINGS:
            raise unknown_name("ranking", name, RANKINGS, f"There are {', '.join(RANKINGS)}.")
    for one in args.shares:
        if not 0 < one < 1:
            raise ValueError(f"--shares {one:g}: give the part of the experts to remove, between 0 and 1, as in 0.25")
    if not 1 <= args.random <= MOST_RANDOM:
        raise ValueError(
            f"--random {args.random}: one mask at random is the least that costs can be compared with, {MOST_RANDOM:,} the most"
        )
    if args.evaluate is not None and args.evaluate < MINIMUM_PAIRS:
        raise ValueError(f"--evaluate {args.evaluate}: an interval over documents takes {MINIMUM_PAIRS} of them or more")
    if args.evaluate_tokens < 2:
        raise ValueError(f"--evaluate-tokens {args.evaluate_tokens}: a loss takes two tokens or more")


def check_sizes(run: Run, args: argparse.Namespace) -> None:
    """Raises `ValueError` before anything is measured for shares that this model cannot lose, and for too few documents."""
    for one in args.shares:
        check_share(one, run.model.cfg.num_experts, run.model.cfg.experts_per_token)
    if args.save_to is None:
        evaluated(len(run.tokenized.documents), args.evaluate)


# --- pruned models, measured -----------------------------------------------------------------------------------------------


def measure(run: Run, args: argparse.Namespace) -> Path:
    """pruning.csv, pruning_summary.csv, the report and the table on the console."""
    earlier = measured_before(run.directory / "pruning.csv", args.evaluate_tokens)
    documents = evaluated(len(run.tokenized.documents), args.evaluate, max((row["n_documents"] for row in earlier), default=0))
    orders = PruningOrders(run.directory, run.model.cfg.num_experts, "even")
    names = (*args.criteria, *map(random_ranking, range(args.random)))
    keys = {(name, args.per, one) for one in args.shares for name in names}
    keys |= {(row["ranking"], row["per"], row["share"]) for row in earlier}
    absent = {name: orders.missing(name) for name in sorted({name for name, _, _ in keys}) if orders.missing(name)}
    for name, reason in absent.items():
        print(f"{label(name)}: {reason}")
    prunings = [orders.prune(name, one, per) for name, per, one in sorted(keys, key=_place) if name not in absent]
    directory = run.directory / "prunings"
    losses = PrunedLosses(run.model, run.tokenized, documents, args.evaluate_tokens, directory, run.plan, log=print)
    intact = losses.of({})
    losses.measure([one.experts for one in prunings], run.executor, progress=True)
    pruned = [losses.of(one.experts).total for one in prunings]
    measured = MeasuredLosses(intact.n_positions, intact.total, np.stack(pruned), args.evaluate_tokens)
    table = pruning_table(prunings, measured, orders.sums, "even")
    written = {"pruning.csv": table, "pruning_summary.csv": pruning_summary(table)}
    write_derived(run.directory, "pruning", written, INPUTS, "hooked-moe prune")
    report = write_report(run.directory)
    for line in lines(table):
        print(line)
    print(f"\nreport: {report}")
    return run.directory


def evaluated(n_documents: int, limit: int | None, at_least: int = 0) -> list[int]:
    """The odd documents, or the first `limit` of them, or as many as an earlier command has measured on, if these are more.

    Raises `ValueError` where they are too few for an interval over documents.
    """
    odd = list(range(1, n_documents, 2))
    odd = odd if limit is None else odd[: max(limit, at_least)]
    if len(odd) < MINIMUM_PAIRS:
        raise ValueError(
            f"{len(odd)} documents to measure on: rankings come from the even documents and losses from the odd ones, and an "
            f"interval takes {MINIMUM_PAIRS} of them: give a corpus, --documents and --evaluate that leave as many"
        )
    return odd


def measured_before(path: Path, n_tokens: int) -> list[dict[str, Any]]:
    """The rows of earlier commands: what they pruned by stays in the table, and so does the number of documents.

    None if they read another number of tokens of each document, or if the table is damaged: it begins again then.
    """
    try:
        rows = read_csv(path, PRUNING).to_pylist() if path.is_file() else []
        known = all(row["ranking"] in RANKINGS or seed_of(row["ranking"]) is not None for row in rows)
    except ValueError:
        rows, known = [], False
    if not known:
        print(f"note: {path} is damaged, and with it is lost what earlier commands pruned by: it is made again of this one alone")
        return []
    if any(row["n_tokens"] != n_tokens for row in rows):
        print(f"{path} is of documents of {rows[0]['n_tokens']} tokens, not {n_tokens}: it is replaced")
        return []
    return rows


def _place(key: tuple[str, str, float]) -> tuple[str, float, int, str]:
    name, per, one = key
    return per, one, RANKINGS.index(name) if name in RANKINGS else len(RANKINGS), name


def lines(table: pa.Table) -> list[str]:
    """Every share, the cheapest pruning first; then how well predictions did, and how the effect table's choice did."""
    rows = table.to_pylist()
    first = rows[0]
    text = [
        f"\nExperts removed for good: rise of the loss in nats, {first['n_documents']} documents of {first['n_tokens']} tokens",
        "  ranking                             rise [95% interval]      of random  predicted",
    ]
    for per, one in dict.fromkeys((row["per"], row["share"]) for row in rows):
        beyond = one > ADDITIVE_SHARE
        text.append(f"{preset_share(one)} of {'every layer' if per == 'layer' else 'the whole model'}")
        own = [row for row in rows if (row["per"], row["share"]) == (per, one)]
        for row in sorted(own, key=lambda row: row["rise"]):
            ends = f"[{signed(row['rise_low'], 4)}, {signed(row['rise_high'], 4)}]"
            costs = f"{row['rise']:.4f} {ends:<20} {share(row['share_of_random']):>6}"
            text.append(f"  {label(row['ranking']):<32}  {costs}     {row['predicted']:.4f}{' *' if beyond else ''}")
    if any(row["share"] > ADDITIVE_SHARE for row in rows):
        text.append(f"* beyond {preset_share(ADDITIVE_SHARE)} removals interact, and the rise exceeds the sum of single effects")
    for row in pruning_summary(table).to_pylist():
        numbers = f"rank correlation {signed(row['spearman'], 2)}, measured / predicted {row['ratio']:.2f}"
        text.append(f"predicted and measured at {preset_share(row['share'])}, {row['population']} ({row['n']}): {numbers}")
    for row in rows:
        if row["ranking"] == TABLE and not np.isnan(row["less_reap"]):
            ends = f"[{signed(row['less_reap_low'], 4)}, {signed(row['less_reap_high'], 4)}]"
            text.append(
                f"chosen by the effect table less REAP at {preset_share(row['share'])}: {signed(row['less_reap'], 4)} {ends}"
            )
    return text


# --- a pruned model, saved --------------------------------------------------------------------------------------------------


def save(run: Run, args: argparse.Namespace) -> Path:
    """The model without the experts that a ranking from all documents prunes first, as a checkpoint for transformers."""
    orders = PruningOrders(run.directory, run.model.cfg.num_experts, None)
    if orders.missing(args.criterion):
        raise ValueError(f"--criterion {args.criterion}: {orders.missing(args.criterion)}")
    pruning = orders.prune(args.criterion, args.shares[0], args.per)
    remaining = remaining_by_layer(run, pruning)
    if len(set(remaining)) > 1:
        raise ValueError(
            f"layers would be left with {', '.join(map(str, remaining))} experts, and transformers loads checkpoints with one "
            "number for all layers only: give --per layer, and all layers"
        )
    remove_experts(run.model, pruning.experts)
    save_pretrained(run.model, args.save_to)
    print(
        f"{args.save_to}: {run.model.cfg.num_experts} experts in each of {len(remaining)} layers, for transformers and hooked_moe"
    )
    forecast = predict_pruning(run.directory, pruning.experts, orders.effect)
    ends = f"[{signed(forecast.low, 4)}, {signed(forecast.high, 4)}]"
    print(f"forecast of the loss: {signed(forecast.rise, 4)} nats {ends}, {forecast.factor:.2f} times the summed single effects")
    caveats = [forecast.note] if forecast.note else []
    if pruning.kind in ("table", "oracle"):
        caveats.append("chosen by the effects of the same documents: the forecast is too low")
    for caveat in caveats:
        print(f"  {caveat}")
    return Path(args.save_to)


def remaining_by_layer(run: Run, pruning: Pruning) -> Sequence[int]:
    cfg = run.model.cfg
    return [cfg.experts_in(layer) - len(pruning.experts.get(layer, ())) for layer in cfg.moe_layers]
