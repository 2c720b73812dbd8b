"""Every experiment of arXiv 2606.10703, in the defined and in the released form, on the three shipped models.

    python -m hooked_moe.cli.paper                                                      # minutes on two CPU cores
    python -m hooked_moe.cli.paper --models olmoe --corpus wikitext-2 --positions 200   # the real one
    python -m hooked_moe.cli.paper --models tiny-qwen-moe --documents 12 --positions 60

Each is the script of its name, run with its defaults; what was measured before is used again. Ends with a summary of each model
beside the published tables, and with the reports' paths.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hooked_moe.cli import audit, redistribution
from hooked_moe.cli import compare as compare_published
from hooked_moe.cli import control as routing_weight_control
from hooked_moe.cli import progressive as progressive_ablation
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.cli.releasing import released_family
from hooked_moe.loading.registry import SHIPPED, locate
from hooked_moe.paper.published import PAIRS

Command = Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("hooked_moe.cli.paper", __doc__)
    parser.add_argument("--models", nargs="+", default=list(SHIPPED), help="which models (default: the shipped ones)")
    parser.add_argument("--corpus", default="held-out", help="as in hooked_moe.cli.audit (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="only the first so many documents of the corpus")
    parser.add_argument(
        "--positions", type=int, default=100, help=f"of each released cell (default: %(default)s; the paper's is {PAIRS})"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go (default: %(default)s)")
    return run_command(paper, parser.parse_args(arguments))


def paper(args: argparse.Namespace) -> None:
    """All experiments, model by model. Raises `ValueError` if one fails: its own message stands above."""
    started = time.perf_counter()
    for model in args.models:
        for title, run, arguments in steps(args, model):
            print(f"\n=== {model}: {title} ({time.perf_counter() - started:.0f} s) ===\n", flush=True)
            if run(arguments) != 0:
                raise ValueError(f"{title} of {model} failed; python -m hooked_moe.cli.paper goes on from there")
    for model in args.models:
        print(f"\n=== {model}: ours | published ===")
        compare_published.main(["--model", model, "--results", str(args.results), "--brief"])
        for report in sorted((args.results / Path(locate(model).model_name).name).glob("*/report.html")):
            print(f"report: {report}")
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def steps(args: argparse.Namespace, model: str) -> list[tuple[str, Command, list[str]]]:
    """What to run: title, script, arguments. The progressive removals come first, so that the audit's report has them."""
    common = ["--model", model, "--corpus", args.corpus, "--results", str(args.results)]
    if args.documents is not None:
        common += ["--documents", str(args.documents)]
    sampled = [*common, "--protocol", "as_released", "--positions", str(args.positions)]
    family = released_family(model, None)
    found: list[tuple[str, Command, list[str]]] = [
        ("progressive ablation", progressive_ablation.main, common),
        ("audit", audit.main, common),
        ("routing-weight control", routing_weight_control.main, common),
        ("redistribution", redistribution.main, common),
        ("audit and control as released", audit.main, sampled),
    ]
    if family.redistribution is not None:
        found.append(("redistribution as released", redistribution.main, [*common, "--protocol", "as_released"]))
    if family.progressive is not None:
        found.append(("progressive ablation as released", progressive_ablation.main, sampled))
    return found


if __name__ == "__main__":
    sys.exit(main())
