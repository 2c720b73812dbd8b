"""Remove every routed expert at every token, one at a time, and ask what the routing statistics knew about it.

    hooked-moe audit                                     # the shipped model on the shipped corpus
    hooked-moe audit --model olmoe --corpus wikitext-2 --layers 0,4,7,11,15 --positions 200
    hooked-moe audit --model olmoe --budget 1%           # a sample of the removals; the others are estimated, without bias
    hooked-moe audit --model olmoe --corpus wikitext-2 --protocol as_released

It verifies, measures, analyses and reports. Results go to results/<model>/<run>/: tables as parquet and csv, report.html with
figures, manifest.json. A killed run resumes where it stopped when the same command is given again, and ends with the same bytes.
The protocol is that of arXiv 2606.10703 in its stated form: the expert is removed at the token only, its output is zeroed, and
only routed experts are removed. With --protocol as_released it is what the paper's code does, as hooked_moe.paper.protocols
tabulates it. Tables 1-3, Figure 1.

In Python, `hooked_moe.audit(model, corpus)` does the same.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from hooked_moe.analysis.cells import Cell, cells_from_table, cells_table
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.analysis.saving_table import SAVINGS
from hooked_moe.checks import WrongTypeError, described, whole_number
from hooked_moe.cli.console import parser_of, run_command
from hooked_moe.cli.measured_run import Execution, MeasuredForm, analyse, open_run, open_run_of, read_documents, share_ends
from hooked_moe.cli.options import (
    add_measurement_arguments,
    as_argument,
    check_run_name,
    choose_device,
    draw_sample,
    parse_budget,
    parse_sample,
)
from hooked_moe.cli.released_run import (
    add_protocol_argument,
    compare_positions,
    open_released_run,
    print_cells,
    released_positions,
    write_released_cells,
)
from hooked_moe.corpus import Corpus, count_paragraphs
from hooked_moe.executors import Executor
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement import Run
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.run_directory import results_directory
from hooked_moe.measurement.tokenized_corpus import DocumentPositions
from hooked_moe.model import HookedMoE
from hooked_moe.report.terminal_savings import terminal_savings
from hooked_moe.statistics import minimum_documents
from hooked_moe.tables import read_csv, read_parquet


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("audit", __doc__)
    add_protocol_argument(parser)
    add_measurement_arguments(parser)
    parser.add_argument(
        "--positions", default="all", help="all (default; as_released: 200), or how many to sample: the paper's sample is 200"
    )
    parser.add_argument(
        "--scope", choices=["position", "both"], default="position", help="both: also remove experts sequence-wide"
    )
    parser.add_argument(
        "--budget",
        metavar="SHARE|TIME",
        help="make a sample of the removals and estimate the others without bias: 1%% of them, or what takes 90s, 10min or 2h",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    work = released_audit if args.protocol == "as_released" else audit_as_asked if args.budget is None else budgeted_audit
    return run_command(work, args)


@dataclass(frozen=True)
class Audit:
    """A finished audit: where its files are, and the first of what they say. Printed, it is what `hooked-moe audit` prints."""

    directory: Path
    """results/<model>/<run>."""
    n_removals: int
    """Removals measured: positions x layers x active experts, or those of them that a budget paid for."""
    is_budgeted: bool = False
    """Whether they are a sample, and all else is estimated."""

    @property
    def report(self) -> Path:
        """The page of results; open it in a browser."""
        return self.directory / "report.html"

    @property
    def savings(self) -> pa.Table:
        """What each criterion saves (savings.csv): a row for each effect, layer (or all) and ranking."""
        return read_csv(self.directory / "savings.csv", SAVINGS)

    @property
    def experts(self) -> pa.Table:
        """Every criterion and the mean effect of every expert (experts.parquet): a row for each layer and expert."""
        return read_parquet(self.directory / "experts.parquet")

    @property
    def cells(self) -> list[Cell]:
        """The tests of the paper's protocol (cells.csv). Raises `ValueError` for a budgeted audit, which cannot make them."""
        if self.is_budgeted:
            raise ValueError("the paper's protocol tests single positions, of which a budgeted audit has a sample only")
        return cells_from_table(read_csv(self.directory / "cells.csv", cells_table([]).schema))

    def __str__(self) -> str:
        return terminal_savings(self.savings, None if self.is_budgeted else self.cells)


def audit(
    model: HookedMoE | str | os.PathLike[str] = "tiny-olmoe",
    corpus: Corpus | str | os.PathLike[str] | Iterable[Any] = "held-out",
    *,
    layers: Iterable[int] | None = None,
    removal: RemovalName = "zero",
    positions: int | None = None,
    scope: Literal["position", "both"] = "position",
    budget: Budget | str | None = None,
    context: int | None = None,
    tokens: int | None = 512,
    bos: bool | None = None,
    unit: str = "article",
    documents: int | None = None,
    products: ProductsName | None = None,
    results: str | os.PathLike[str] = "results",
    name: str | None = None,
    memory_budget: int | str | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> Audit:
    """What `hooked-moe audit` does with the same options: the same directory, with the same bytes.

        found = hooked_moe.audit(model, "held-out", progress=True)
        print(found)                            # which criterion to prune by, and what each saves
        found.report, found.savings, found.experts, found.directory

    `model` is a model, or a name or directory as `HookedMoE.from_pretrained` takes it; `corpus` what `load_corpus` takes, a
    document of which is what `unit` says, and of which the first `documents` are read. `positions` samples that many tokens in
    place of all, `scope="both"` also removes experts from whole sequences; a `budget`, such as "1%" or "10min", makes a sample
    of all removals and estimates the others. `context` is the tokens of a window (None: the model's context, 512 at most),
    `tokens` those of each document (None: all), `products` as in `expert_effects`, `name` the run's directory. `executor` says
    where documents are measured, such as `RayExecutor("auto")`; None: here. `log` is told what the command prints on the way,
    such as `print`; `progress` shows a bar. An audit that was interrupted resumes where it stopped.

    Raises what `open_measurement` raises, and `ValueError` for options that do not fit the model or the corpus.
    """
    if not isinstance(model, HookedMoE):
        model = HookedMoE.from_pretrained(model, device=choose_device(None))
    check_run_name(name, as_argument)
    if scope not in ("position", "both"):
        raise ValueError(f"scope must be 'position' or 'both', not {scope!r}")
    if budget is not None:
        if not isinstance(budget, str | Budget):
            raise WrongTypeError(f"budget must be text, as in '1%' or '10min', or a Budget, not {described(budget)}")
        budget = parse_budget(budget, "budget") if isinstance(budget, str) else budget
        require_all(positions is None and scope == "position", "positions and scope")
    read = read_documents(model, corpus, unit, documents, as_argument, log)
    form = MeasuredForm(layers, removal, context, tokens, bos, budget, products)
    execution = Execution(executor=executor)
    with open_run_of(model, read, form, results_directory(results), name, as_argument, execution, log) as run:
        if budget is not None:
            return finish_budgeted(run, memory_budget, progress, log)
        valid = run.tokenized.valid_positions()
        sample = None if positions is None else draw_sample(whole_number(positions, "positions"), valid, f"{positions=}")
        found = finish_audit(run, sample, scope == "both", memory_budget, progress, log)
    assert found is not None  # only a share ends without
    return found


def audit_as_asked(args: argparse.Namespace) -> Path:
    """The whole audit; returns the run's directory. Raises `ValueError` and `OSError` that say what to do."""
    started = time.perf_counter()
    with open_run(args) as run:
        sample = parse_sample(args.positions, run.tokenized.valid_positions())
        found = finish_audit(run, sample, args.scope == "both", args.memory, progress=True, log=print)
        if found is None:
            return run.directory
    return shown(found, started)


def budgeted_audit(args: argparse.Namespace) -> Path:
    """The audit of a sample of the removals; returns the run's directory. Raises as `audit_as_asked` does."""
    require_all(args.positions == "all" and args.scope == "position", "--positions and --scope")
    if args.shard is not None:
        raise ValueError(
            "--budget draws from the removals of all documents, which a share of them does not know: leave out --shard; with "
            "--ray the audit is shared out as well"
        )
    budget, started = parse_budget(args.budget), time.perf_counter()
    with open_run(args, budget) as run:
        found = finish_budgeted(run, args.memory, progress=True, log=print)
    return shown(found, started)


def require_all(everything: bool, options: str) -> None:
    """Raises `ValueError` for a budget on something else than all removals."""
    if not everything:
        raise ValueError(
            f"a budget draws from the removals of single experts at all positions of all documents: leave out {options}"
        )


def shown(found: Audit, started: float) -> Path:
    """Print what was found, and how long it took; returns the run's directory."""
    print(f"{found}\n{found.n_removals:,} removals; {time.perf_counter() - started:.0f} s in all\nreport: {found.report}")
    return found.directory


def finish_audit(
    run: Run,
    sample: DocumentPositions | None,
    sequences: bool,
    memory_budget: int | str | None,
    progress: bool,
    log: Callable[[str], object],
) -> Audit | None:
    """Measure at the sampled positions (None: all), with `sequences` also from whole sequences; analyse, and report. None for a
    share, which ends before any analysis."""
    positions = run.tokenized.valid_positions() if sample is None else sample
    n_removals = len(positions) * len(run.layers) * run.model.cfg.experts_per_token
    log(f"removals to measure: {n_removals:,}\nresults: {run.directory}")
    needed = minimum_documents(len(PAPER_CRITERIA) * len(run.layers))
    measured = len({document for document, _ in positions})
    if measured < needed:
        log(few_documents_note(run.tokenized.corpus, measured, needed))
    log("")
    run.require("position", sample, memory_budget=memory_budget, progress=progress)
    if sequences:
        run.require("sequence", sample, memory_budget=memory_budget, progress=progress)
    if share_ends(run, log):
        return None
    analyse(run, log, progress)
    return Audit(run.directory, n_removals)


def finish_budgeted(run: Run, memory_budget: int | str | None, progress: bool, log: Callable[[str], object]) -> Audit:
    """Measure a sample of the removals; analyse, and report."""
    total = len(run.tokenized.valid_positions()) * len(run.layers) * run.model.cfg.experts_per_token
    log(f"removals, of which a sample is made: {total:,}\nresults: {run.directory}\n")
    draw = run.require_sample(memory_budget=memory_budget, progress=progress)
    made = int(draw.n_drawn.sum())
    log(f"{made:,} removals made, {made / total:.2%} of all, drawn with seed {draw.seed}; the others are estimated\n")
    analyse(run, log, progress)
    return Audit(run.directory, made, is_budgeted=True)


def few_documents_note(corpus: Corpus, measured: int, needed: int) -> str:
    """What a corpus with too few documents cannot answer, and how to get more of them."""
    note = (
        f"note: {measured} document{'' if measured == 1 else 's'} of {corpus.name!r}: tests over documents need {needed} or more "
        "and will be refused; those over positions are made"
    )
    if measured < len(corpus.documents):
        return f"{note}. Sample more positions: the corpus has {len(corpus.documents)} documents"
    pieces = count_paragraphs(corpus)
    if pieces > len(corpus.documents):
        return (
            f'{note}. To read each of the {pieces} pieces between blank lines as a document: --unit paragraph (unit="paragraph")'
        )
    return (
        f"{note}. For more documents: a directory of .txt files, a .jsonl file with a document on each line, or a .txt file with "
        'a line that holds only U+001E, or blank lines and --unit paragraph (unit="paragraph"), between documents'
    )


def released_audit(args: argparse.Namespace) -> Path:
    """Four metrics and the control, by the paper's code; returns the run's directory."""
    if args.budget is not None:
        raise ValueError("--budget is of the defined protocol: leave out --protocol as_released")
    n = released_positions(args.positions)
    with open_released_run(args) as run:
        run.experts()
        comparisons = run.audit(n)
        print_cells(write_released_cells(run, n, comparisons, run.control(n)))
        same = compare_positions(run, comparisons)
        if same is not None:
            print(same)
    return run.directory
