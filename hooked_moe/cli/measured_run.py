"""A run of the defined protocol: opened from the options, analysed, reported. All experiments share its measurement."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hooked_moe.analysis import analyse_run, analysis_fault
from hooked_moe.cli.options import (
    DTYPES,
    SEED,
    check_memory,
    check_run_name,
    choose_device,
    executor_of,
    first_documents,
    parse_layers,
    parse_share,
    parse_tokens,
)
from hooked_moe.corpus import load_corpus
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import MINIMUM_TOKENS
from hooked_moe.model import HookedMoE
from hooked_moe.report import report_fault, write_report
from hooked_moe.report.explorer import explorer_fault, write_explorer
from hooked_moe.tables import NOT_MADE, required_file

SAMPLE_SIZE = 200


def open_run(args: argparse.Namespace) -> Run:
    """The measurement that the arguments name, new or to be continued; says what it is.

    Raises `ValueError` and `OSError` that say what to do.
    """
    check_run_name(args.run)
    check_memory(args.memory)
    share, executor = parse_share(args.shard), executor_of(args)
    model = HookedMoE.from_pretrained(
        args.model,
        dtype=DTYPES[args.dtype or "float32"],
        device=choose_device(args.device),
        revision=args.revision,
        stream=args.stream,
    )
    corpus = first_documents(load_corpus(args.corpus), args.documents)
    n_ctx = min(model.cfg.n_ctx, 512) if args.context is None else args.context
    if args.context is not None and not MINIMUM_TOKENS <= n_ctx <= model.cfg.n_ctx:
        raise ValueError(
            f"--context {n_ctx}: give a number from {MINIMUM_TOKENS} to {model.cfg.n_ctx}, the context of {args.model}"
        )
    tokenized = TokenizedCorpus(model, corpus, n_ctx, parse_tokens(args.tokens), args.bos)
    longest = max(tokenized.lengths()) + tokenized.first
    if args.context is not None and n_ctx > longest:
        raise ValueError(
            f"--context {n_ctx}: the longest document of {corpus.name!r} has {longest} tokens (--tokens {args.tokens}): no "
            "window is as long; give a shorter context or longer documents"
        )
    layers = parse_layers(args.layers, model.cfg)
    run = open_measurement(
        model,
        tokenized,
        layers,
        args.removal,
        results=args.results,
        name=args.run,
        share=share,
        executor=executor,
        object_store=args.object_store,
        log=print,
    )
    shared = "" if model.cfg.d_shared is None else ", and shared experts, which stay"
    print(
        f"{model.cfg.model_name}: {len(layers)} layers of {model.cfg.num_experts} experts, {model.cfg.experts_per_token} active"
        f"{shared}"
    )
    extent = "" if args.tokens == "all" else f" (of each the first {args.tokens} at most)"
    print(f"{corpus.name}: {len(corpus.documents)} documents, {sum(tokenized.lengths()):,} tokens{extent}")
    return run


def share_ends(run: Run) -> bool:
    """Whether the run is of a share, which ends before any analysis; says how it goes on then."""
    if run.share is None:
        return False
    print(f"share {run.share} is measured; once all are, the same command without --shard merges, analyses and reports")
    return True


def analyse(run: Run) -> Path:
    """Derive what the run's measured tables give, unless that was done of these very tables; returns the report's path."""
    directory, known = run.directory, run.known_files()
    required_file(directory, "effects.parquet", "no removals were measured yet")
    positions = run.manifest["parts"]["position"]["positions"]
    available = len(run.tokenized.valid_positions()) if positions == "all" else int(positions)
    settings: dict[str, Any] = {
        "n_experts": run.model.cfg.num_experts,
        "layers": run.layers,
        "n_positions": min(SAMPLE_SIZE, available),
        "seed": SEED,
    }
    fault = analysis_fault(directory, known=known, **settings)
    if fault is not None:
        _say_why("analysed again", fault)
        analyse_run(directory, **settings)
    fault = explorer_fault(directory, known)
    if fault is not None:
        _say_why("explorer pages made again", fault)
        write_explorer(directory)
    fault = report_fault(directory, known)
    if fault is None:
        return directory / "report.html"
    _say_why("reported again", fault)
    return write_report(directory)


def _say_why(what: str, fault: str) -> None:
    if fault != NOT_MADE:  # the first time needs no reason
        print(f"{what}: {fault}")
