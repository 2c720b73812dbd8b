"""A run of the defined protocol: opened from the options, analysed, reported. All experiments share its measurement."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_moe.analysis import analyse_run, analysis_fault
from hooked_moe.analysis.budgeted import analyse_budgeted, budgeted_fault
from hooked_moe.checks import whole_number
from hooked_moe.cli.options import (
    SEED,
    Spelling,
    as_option,
    check_memory,
    check_run_name,
    choose_device,
    dtype_named,
    executor_of,
    first_documents,
    parse_layers,
    parse_share,
    parse_tokens,
    products_named,
)
from hooked_moe.corpus import Corpus, load_corpus
from hooked_moe.corpus.corpora import corpus_of
from hooked_moe.executors import Executor
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import MINIMUM_TOKENS
from hooked_moe.model import HookedMoE
from hooked_moe.report import DrawingHelper, report_fault, write_report
from hooked_moe.report.explorer import explorer_fault, write_explorer
from hooked_moe.tables import NOT_MADE, FileRecords, required_file

SAMPLE_SIZE = 200


def open_run(args: argparse.Namespace, budget: Budget | None = None) -> Run:
    """The measurement that the arguments name, new or to be continued; says what it is.

    Raises `ValueError` and `OSError` that say what to do.
    """
    check_run_name(args.run)
    check_memory(args.memory)
    device = choose_device(args.device)
    share, executor = parse_share(args.shard), executor_of(args)
    model = HookedMoE.from_pretrained(
        args.model,
        dtype=dtype_named(args.dtype or "float32", device),
        device=device,
        revision=args.revision,
        stream=args.stream,
        store=args.store,
    )
    corpus = read_documents(model, args.corpus, args.unit, args.documents, log=print)
    form = MeasuredForm(
        parse_layers(args.layers, model.cfg),
        args.removal,
        args.context,
        parse_tokens(args.tokens),
        args.bos,
        budget,
        products_named(args.products, device),
    )
    execution = Execution(share, executor, args.object_store)
    return open_run_of(model, corpus, form, args.results, args.run, execution=execution, log=print)


@dataclass(frozen=True)
class MeasuredForm:
    """What is measured of a model on a corpus."""

    layers: Iterable[int] | None = None
    """None: all that have experts."""
    removal: RemovalName = "zero"
    context: int | None = None
    """Tokens per window; None: the model's context, 512 at most."""
    tokens: int | None = 512
    """Of each document; None: all."""
    bos: bool | None = None
    budget: Budget | None = None
    """None: every removal that is asked for."""
    products: ProductsName | None = None
    """The dtype of products of a removal's change; None: all are as the clean run's."""


@dataclass(frozen=True)
class Execution:
    """Where it is measured; see `open_measurement`."""

    share: Share | None = None
    executor: Executor | None = None
    object_store: str | None = None


def read_documents(
    model: HookedMoE,
    source: Any,
    unit: str,
    first: int | None,
    spell: Spelling = as_option,
    log: Callable[[str], object] = lambda line: None,
) -> Corpus:
    """The first documents of a corpus; paragraphs that are too short to predict anything are left out, which the log is told."""
    corpus = source if isinstance(source, Corpus) else load_corpus(source, unit=unit)
    if unit == "paragraph" and model.tokenizer is not None and not isinstance(source, Corpus):
        kept = [document for document in corpus.documents if len(model.tokenizer.encode(document.text, prepend_bos=False)) > 1]
        if len(kept) < len(corpus.documents):
            dropped = len(corpus.documents) - len(kept)
            log(f"note: {dropped} paragraph{' of one token is' if dropped == 1 else 's of one token are'} left out")
            corpus = corpus_of(corpus.name, kept)
    return first_documents(corpus, first, spell)


def open_run_of(
    model: HookedMoE,
    corpus: Corpus,
    form: MeasuredForm,
    results: Path,
    name: str | None,
    spell: Spelling = as_option,
    execution: Execution = Execution(),
    log: Callable[[str], object] = lambda line: None,
) -> Run:
    """The measurement of a model that is loaded, new or to be continued; tells the log what it is."""
    n_ctx, limit = min(model.cfg.n_ctx, 512) if form.context is None else form.context, form.tokens
    if form.context is not None and not MINIMUM_TOKENS <= n_ctx <= model.cfg.n_ctx:
        raise ValueError(
            f"{spell('context', n_ctx)}: give a number from {MINIMUM_TOKENS} to {model.cfg.n_ctx}, the context of "
            f"{model.cfg.model_name}"
        )
    if limit is not None and whole_number(limit, "tokens") < 2:
        raise ValueError(f"{spell('tokens', limit)}: give 2 or more of each document: one token predicts nothing")
    tokenized = TokenizedCorpus(model, corpus, n_ctx, limit, form.bos)
    longest = max(tokenized.lengths()) + tokenized.first
    if form.context is not None and n_ctx > longest:
        asked = spell("tokens", limit if limit is not None else "all")
        raise ValueError(
            f"{spell('context', n_ctx)}: the longest document of {corpus.name!r} has {longest} tokens ({asked}): no window is as "
            "long; give a shorter context or longer documents"
        )
    run = open_measurement(
        model,
        tokenized,
        form.layers,
        form.removal,
        results=results,
        name=name,
        share=execution.share,
        executor=execution.executor,
        object_store=execution.object_store,
        budget=form.budget,
        products=form.products,
        log=log,
    )
    shared = "" if model.cfg.d_shared is None else ", and shared experts, which stay"
    log(
        f"{model.cfg.model_name}: {len(run.layers)} layers of {model.cfg.num_experts} experts, "
        f"{model.cfg.experts_per_token} active{shared}"
    )
    extent = "" if limit is None else f" (of each the first {limit} at most)"
    log(f"{corpus.name}: {len(corpus.documents)} documents, {sum(tokenized.lengths()):,} tokens{extent}")
    return run


def share_ends(run: Run, log: Callable[[str], object] = print) -> bool:
    """Whether the run is of a share, which ends before any analysis; says how it goes on then."""
    if run.share is None:
        return False
    log(f"share {run.share} is measured; once all are, the same command without --shard merges, analyses and reports")
    return True


def analyse(run: Run, log: Callable[[str], object] = print, progress: bool = True) -> Path:
    """Derive what the run's measured tables give, unless that was done of these very tables; returns the report's path."""
    directory, known = run.directory, run.known_files()
    if run.budget is not None:
        return _analyse_budgeted(directory, run.model.cfg.num_experts, known, log, progress)
    required_file(directory, "effects.parquet", "no removals were measured yet")
    positions = run.manifest["parts"]["position"]["positions"]
    available = len(run.tokenized.valid_positions()) if positions == "all" else int(positions)
    settings: dict[str, Any] = {
        "n_experts": run.model.cfg.num_experts,
        "layers": run.layers,
        "n_positions": min(SAMPLE_SIZE, available),
        "seed": SEED,
    }
    with DrawingHelper() as helper:
        fault = analysis_fault(directory, known=known, **settings)
        if fault is not None:
            _say_why("analysed again", fault, log)
            helper.start()
            analyse_run(directory, progress=progress, **settings)
            helper.draw(directory)
        fault = explorer_fault(directory, known)
        if fault is not None:
            _say_why("explorer pages made again", fault, log)
            write_explorer(directory)
        return _report(directory, known, log, progress, helper)


def _analyse_budgeted(directory: Path, n_experts: int, known: FileRecords, log: Callable[[str], object], progress: bool) -> Path:
    """The same for a run with a budget, which has no removals to look at one by one."""
    with DrawingHelper() as helper:
        fault = budgeted_fault(directory, known, n_experts=n_experts, seed=SEED)
        if fault is not None:
            _say_why("analysed again", fault, log)
            helper.start()
            analyse_budgeted(directory, n_experts=n_experts, seed=SEED)
        return _report(directory, known, log, progress, helper)


def _report(directory: Path, known: FileRecords, log: Callable[[str], object], progress: bool, helper: DrawingHelper) -> Path:
    fault = report_fault(directory, known)
    if fault is None:
        return directory / "report.html"
    _say_why("reported again", fault, log)
    return write_report(directory, progress=progress, helper=helper)


def _say_why(what: str, fault: str, log: Callable[[str], object]) -> None:
    if fault != NOT_MADE:  # the first time needs no reason
        log(f"{what}: {fault}")
