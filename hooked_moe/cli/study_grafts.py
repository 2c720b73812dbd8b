"""Which layers and which parts carry the difference between two trainings of one architecture.

    hooked-moe study grafts                                             # tiny-olmoe against tiny-olmoe-facts, on its facts
    hooked-moe study grafts --b my-continuation --readout loss          # on the held-out corpus
    hooked-moe study grafts --a olmoe --a-revision step1200000-tokens5033B --b olmoe --readout loss --stream --documents 20

Every graft is `a` with parts of `b`, or the other way round: suffixes, prefixes and single layers, every part, every part of
every layer. Written to --out: grafts.csv, shapley_layers.csv and shapley_parts.csv (exact, all coalitions), reinitialised.csv
(the null: the same parts of `a` and of `b` new), seeds.csv (the floor: with --floor, the same parts from an independent
training), report.html and figures/, every figure also as csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from hooked_moe.cli.options import first_documents
from hooked_moe.corpus import load_corpus, load_facts
from hooked_moe.loading.pretrained import find
from hooked_moe.measurement.document_losses import document_losses, predicted_tokens
from hooked_moe.measurement.fact_losses import FactLosses
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.model import HookedMoE
from hooked_moe.report.graft_page import write_graft_report
from hooked_moe.surgery import (
    CheckpointGrafts,
    DocumentValues,
    align_experts,
    coalition_shares,
    graft_sweep,
    null_sweep,
    untrained,
)
from hooked_moe.surgery.graft_sweeps import NULL_SWEEPS, SWEEPS, Readout
from hooked_moe.tables import write_csv_atomic, write_json_atomic
from hooked_moe.transformer import Transformer

PLAYERS: tuple[Literal["layers", "parts"], ...] = ("layers", "parts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--a", default="tiny-olmoe", help="a model: name, hub id or directory (default: %(default)s)")
    parser.add_argument("--b", default="tiny-olmoe-facts", help="another training of it (default: %(default)s)")
    parser.add_argument("--a-revision", metavar="REV", help="branch or commit of a on the hub")
    parser.add_argument("--b-revision", metavar="REV", help="likewise of b")
    parser.add_argument("--floor", metavar="NAME", help="a training of the same from another seed, to graft onto both")
    parser.add_argument(
        "--match-experts", action="store_true", help="renumber the experts of b, and of --floor, to stand as in a"
    )
    parser.add_argument("--readout", choices=["facts", "loss"], default="facts", help="what is read (default: %(default)s)")
    parser.add_argument("--facts", default="embedded", help="facts to ask about (default: %(default)s)")
    parser.add_argument("--n-facts", type=int, default=400, metavar="N", help="ask N of them at most (default: %(default)s)")
    parser.add_argument("--corpus", default="held-out", help="text for --readout loss (default: %(default)s)")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents")
    parser.add_argument("--tokens", type=int, default=128, help="of each document (default: %(default)s)")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--no-shapley", action="store_true", help="leave out exact shares, 2^(layers + 1) grafts")
    parser.add_argument("--stream", action="store_true", help="read every graft from the files of both, a block at a time")
    parser.add_argument("--out", type=Path, default=Path("results/studies/grafts"), help="where to write (default: %(default)s)")


def run(args: argparse.Namespace) -> Path:
    """The whole study; returns the report's path."""
    if args.n_facts < 1:
        raise ValueError(f"--n-facts {args.n_facts}: give 1 or more")
    if args.floor and not set(NULL_SWEEPS) & set(args.sweeps):
        raise ValueError(f"--floor goes with the sweeps {', '.join(NULL_SWEEPS)}, and --sweeps names none of them")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stream:
        return _finish(args, CheckpointGrafts(HookedMoE, *_directories(args), stream=True), None)
    a, b = (HookedMoE.from_pretrained(name, revision=revision) for name, revision in _pair(args))
    if args.match_experts:
        b = align_experts(a, b)
    return _finish(args, a, b)


def _finish(args: argparse.Namespace, a: Any, b: HookedMoE | None) -> Path:
    first: Transformer = a if b is not None else a.model([])
    readout, describe = _readout(args, first)
    tables: dict[str, pa.Table] = {"grafts.csv": graft_sweep(a, b, readout, args.sweeps, progress=True)}
    if not args.no_shapley:
        for players in PLAYERS:
            tables[f"shapley_{players}.csv"] = coalition_shares(a, b, readout, players, progress=True)
    sweeps = [sweep for sweep in NULL_SWEEPS if sweep in args.sweeps]
    if b is not None and sweeps:
        tables["reinitialised.csv"] = null_sweep(a, b, untrained(b), readout, sweeps, progress=True)
        if args.floor:
            other = HookedMoE.from_pretrained(args.floor)
            other = align_experts(a, other) if args.match_experts else other
            tables["seeds.csv"] = null_sweep(a, b, other, readout, sweeps, progress=True)
    for name in (*(f"shapley_{players}.csv" for players in PLAYERS), "reinitialised.csv", "seeds.csv"):
        (args.out / name).unlink(missing_ok=True)  # of an earlier run with other options
    for name, table in tables.items():
        write_csv_atomic(table, args.out / name)
    ends = {name: describe(model) for name, model in (("a", first), ("b", b)) if model is not None}
    names = {"a": _named(args.a, args.a_revision), "b": _named(args.b, args.b_revision)}
    if args.floor:
        names["floor"] = f"{args.floor}, experts {'matched to those of a' if args.match_experts else 'as they are'}"
    write_json_atomic({"models": names, "readout": args.readout, "ends": ends}, args.out / "study.json")
    report = write_graft_report(args.out)
    print(f"report: {report}")
    return report


def _pair(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    return [(args.a, args.a_revision), (args.b, args.b_revision)]


def _directories(args: argparse.Namespace) -> list[Path]:
    if args.match_experts or args.floor:
        raise ValueError("--match-experts and --floor need both models in memory: leave them out, or --stream")
    return [find(name, revision, None, local_files_only=False)[0] for name, revision in _pair(args)]


def _named(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} ({revision})"


def _readout(args: argparse.Namespace, model: Transformer) -> tuple[Readout, Callable[[Transformer], str]]:
    """The readout, and what to say of a whole model in words."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{args.a} has no tokenizer, so it cannot read a text: put its tokenizer.json beside its weights")
    if args.readout == "facts":
        records = [record for record in load_facts(args.facts) if record.split != "held out"]
        facts = FactLosses(tokenizer, records[:: max(1, -(-len(records) // args.n_facts))])
        return (lambda graft: DocumentValues(*facts.losses(graft))), lambda whole: _facts_of(facts, whole)
    corpus = first_documents(load_corpus(args.corpus), args.documents)
    tokenized = TokenizedCorpus(model, corpus, min(model.cfg.n_ctx, 512), args.tokens)
    n = predicted_tokens(tokenized).astype(float)
    return (lambda graft: DocumentValues(document_losses(graft, tokenized), n)), lambda whole: _loss_of(tokenized, whole)


def _facts_of(facts: FactLosses, model: Transformer) -> str:
    total, count = facts.losses(model)
    return (
        f"{int(count.sum())} facts of {len(count)} subjects: -log p(answer) {total.sum() / count.sum():.3f} nats, "
        f"accuracy among the answers of a relation {facts.accuracy(model):.1%}"
    )


def _loss_of(tokenized: TokenizedCorpus, model: Transformer) -> str:
    n = predicted_tokens(tokenized)
    return f"{len(n)} documents: loss {document_losses(model, tokenized).sum() / n.sum():.3f} nats per token"
