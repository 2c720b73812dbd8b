"""Run every experiment of arXiv 2606.10703, in the defined and in the released form, on the shipped models.

    hooked-moe paper                                                      # minutes on two CPU cores
    hooked-moe paper --models olmoe --corpus wikitext-2 --positions 200   # the published model
    hooked-moe paper --models tiny-qwen-moe --documents 12 --positions 60

Each experiment is the command of its name, run with its defaults (pruning: one share, a few rankings); what was measured before
is used again. At the end there is a summary of each model beside the published tables, the paper's released comparisons read in
nats, and the paths of the reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hooked_moe.cli import audit, compare, control, progressive, prune, redistribution
from hooked_moe.cli.console import INTERRUPTED, parser_of, run_command, whole_number
from hooked_moe.cli.options import first_documents
from hooked_moe.cli.released_run import released_family
from hooked_moe.corpus import load_corpus
from hooked_moe.loading.registry import locate
from hooked_moe.paper.published import PAIRS
from hooked_moe.statistics import MINIMUM_PAIRS

PRUNINGS = [
    *("--shares", "0.25", "--random", "2", "--evaluate", "12", "--criteria", "reap", "weighted_ean"),
    *("mean_routing_weight_when_active", "utilization_rate", "activation_norm", "mean_effect"),
]
"""The reduced form of `hooked-moe prune`: seconds for a shipped model. The command alone prunes by everything."""
Command = Callable[[list[str]], int]


BEYOND_THE_PAPER = ("tiny-mixtral",)
"""Models of families that the paper did not audit: they have no released protocol and no published numbers."""
MODELS = ("tiny-olmoe", "tiny-qwen-moe", "tiny-deepseek-moe", *BEYOND_THE_PAPER)
"""The shipped models of the paper's three families, and one of few, wide experts: what it left open."""


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("paper", __doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="which models (default: %(default)s)")
    parser.add_argument("--corpus", default="held-out", help="as in `hooked-moe audit` (default: %(default)s)")
    parser.add_argument("--documents", type=whole_number, help="only the first N documents of the corpus")
    parser.add_argument(
        "--positions",
        type=whole_number,
        default=100,
        help=f"of each released cell (default: %(default)s; the paper's is {PAIRS})",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go (default: %(default)s)")
    return run_command(paper, parser.parse_args(arguments))


def paper(args: argparse.Namespace) -> int:
    """All experiments, model by model; returns the exit code. Raises `ValueError` if one fails: its own message stands above."""
    started = time.perf_counter()
    for model in args.models:
        for title, run, arguments in steps(args, model):
            print(f"\n=== {model}: {title} ({time.perf_counter() - started:.0f} s) ===\n", flush=True)
            code = run(arguments)
            if code == INTERRUPTED:  # which has been said
                return code
            if code != 0:
                raise ValueError(f"{title} of {model} failed; `hooked-moe paper` resumes from there")
    runs = []
    for model in args.models:
        if model in BEYOND_THE_PAPER:
            continue
        print(f"\n=== {model}: ours | published ===")
        code = compare.main(["--model", model, "--results", str(args.results), "--brief"])
        if code != 0:
            return code
        runs += compare.runs_of(model, args.results)
    compare.reread_released(runs, args.results)
    for model in args.models:
        for report in sorted((args.results / Path(locate(model).model_name).name).glob("*/report.html")):
            print(f"report: {report}")
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return 0


def steps(args: argparse.Namespace, model: str) -> list[tuple[str, Command, list[str]]]:
    """What to run: title, command, arguments. The progressive removals come first, so that the audit's report has them."""
    common = ["--model", model, "--corpus", args.corpus, "--results", str(args.results)]
    if args.documents is not None:
        common += ["--documents", str(args.documents)]
    planned: list[tuple[str, Command, list[str]]] = [
        ("progressive ablation", progressive.main, common),
        ("audit", audit.main, common),
        ("routing-weight control", control.main, common),
        ("redistribution", redistribution.main, common),
        *pruning(args, common),
    ]
    if model in BEYOND_THE_PAPER:
        return planned
    sampled = [*common, "--protocol", "as_released", "--positions", str(args.positions)]
    family = released_family(model, None)
    planned.append(("audit and control as released", audit.main, sampled))
    if family.redistribution is not None:
        planned.append(("redistribution as released", redistribution.main, [*common, "--protocol", "as_released"]))
    if family.progressive is not None:
        planned.append(("progressive ablation as released", progressive.main, sampled))
    return planned


def pruning(args: argparse.Namespace, common: list[str]) -> Iterator[tuple[str, Command, list[str]]]:
    """A quarter of every layer pruned by a few rankings, where there are documents enough to learn from and to measure on."""
    if len(first_documents(load_corpus(args.corpus), args.documents).documents) >= 2 * MINIMUM_PAIRS:
        yield "pruning", prune.main, [*common, *PRUNINGS]
