"""Which expert carries a fact: causal tracing with every expert of every layer, on facts that the model knows.

    hooked-moe trace                                             # the shipped model that was taught facts: about a minute
    hooked-moe trace --model tiny-olmoe --facts associations     # a model that was taught none: a coalition, no single expert
    hooked-moe trace --corruption noise --foils prior
    hooked-moe trace --positions all                             # every token from the subject on, not the last alone
    hooked-moe trace --split "held out" --unfiltered --token-rule first_token --min-cases 50    # facts that were never taught
    hooked-moe trace --model olmoe-0125 --facts counterfact.json
    hooked-moe trace --model qwen3-30b-a3b --facts counterfact --stream
    hooked-moe trace --model mixtral-8x7b --facts counterfact.json --protocol as_published --published-cases --stream
    hooked-moe trace --model allenai/OLMoE-1B-7B-0125-Instruct --facts counterfact.json --chat
    hooked-moe trace --model olmoe-0125 --facts counterfact.json --ray auto                # batches of cases on a Ray cluster

An expert is chosen on half of the cases; every number shown is of the other half, with a 95% interval over cases. Results go to
RESULTS/MODEL/trace-...: tables of every patch (parquet), findings.csv, and report.html. A killed run resumes where it stopped
when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.circuits.tracing import TracingResult, trace_facts
from hooked_moe.circuits.tracing.findings import choice_stability, conclusion, findings
from hooked_moe.circuits.tracing.places import PLACES
from hooked_moe.circuits.tracing.protocol import DEFINED, PROTOCOLS
from hooked_moe.circuits.tracing.published import compare_published, published_cases, published_models
from hooked_moe.cli.console import parser_of, run_command, whole_number
from hooked_moe.cli.options import DTYPES, add_ray_arguments, check_run_name, choose_device, dtype_named, executor_of
from hooked_moe.corpus import FACT_SETS, load_facts
from hooked_moe.loading.registry import locate
from hooked_moe.model import HookedMoE
from hooked_moe.report.tracing import write_tracing_report
from hooked_moe.tables import write_csv_atomic

INSTRUCTION = "Complete the sentence with the single most likely next word."


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("trace", __doc__)
    parser.add_argument("--model", default="tiny-olmoe-facts", help="short name, hub id or directory (default: %(default)s)")
    known = ", ".join(FACT_SETS)
    parser.add_argument("--facts", default="embedded", help=f"{known}, or a counterfact.json (default: %(default)s)")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="defined")
    parser.add_argument("--corruption", choices=["noise", "replace"], help=f"default: {DEFINED.corruption}; as_published: noise")
    parser.add_argument(
        "--positions",
        choices=["final", "subject_last", "all"],
        help="patch the last token, the subject's last, or every token from the subject on (default: final)",
    )
    parser.add_argument("--foils", choices=["given", "prior"], help="of noised cases: as given, or as likely without the subject")
    parser.add_argument(
        "--chat",
        nargs="?",
        const=INSTRUCTION,
        metavar="INSTRUCTION",
        help=f"begin the assistant's answer with the prompt, after a user asked this (by itself: {INSTRUCTION!r})",
    )
    parser.add_argument(
        "--sigma", type=float, help=f"of the noise, in standard deviations of the embeddings (default: {DEFINED.sigma})"
    )
    parser.add_argument("--draws", type=whole_number, help=f"of the noise, for each case (default: {DEFINED.draws})")
    parser.add_argument("--cases", type=whole_number, help=f"at most (default: {DEFINED.n_cases})")
    parser.add_argument(
        "--min-cases",
        type=whole_number,
        help=f"fewer usable ones are refused (default: {DEFINED.min_cases}, or --cases if that is less)",
    )
    parser.add_argument("--search", choices=["joint", "layer_first"], help="over layers and experts together, or the layer first")
    parser.add_argument("--token-rule", choices=["space", "bare_first", "first_token"], help="which token an answer is")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="begin prompts with BOS (default: as the tokenizer does)"
    )
    parser.add_argument(
        "--split", choices=["taught", "held out", "all"], default="taught", help="which embedded facts (default: %(default)s)"
    )
    parser.add_argument("--unfiltered", action="store_true", help="use facts that the model does not know, too")
    parser.add_argument(
        "--published-cases", action="store_true", help="only the CounterFact records of the paper's own cases, in its split"
    )
    parser.add_argument("--seed", type=whole_number, help="of the records' order and of the split into halves (default: 0)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--stream", action="store_true", help="keep one block of the model in memory at a time")
    parser.add_argument("--revision", help="commit or branch of the model on the hub")
    parser.add_argument("--memory", metavar="BYTES", help="bound the memory beside the model's weights, as in 4GB")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go (default: %(default)s)")
    parser.add_argument("--run", help="name of the run (default: from its settings)")
    add_ray_arguments(parser)
    return run_command(trace, parser.parse_args(arguments))


def trace(args: argparse.Namespace) -> Path:
    """Trace, write the tables and the report, and show the findings; returns the run's directory."""
    check_run_name(args.run)
    records, discovery = load_facts(args.facts), None
    if args.published_cases:
        discovery, validation = published_cases(_published_name(args.model))
        records = [record for record in records if record.case_id in discovery | validation]
    device, executor = choose_device(args.device), executor_of(args)
    model = HookedMoE.from_pretrained(
        args.model, dtype=dtype_named(args.dtype, device), device=device, revision=args.revision, stream=args.stream
    )
    results = args.results / model.cfg.model_name
    records = [record for record in records if args.split == "all" or record.split in ("", args.split)]
    result = trace_facts(
        model,
        records,
        protocol=args.protocol,
        discovery=discovery,
        memory_budget=args.memory,
        executor=executor,
        directory=results,
        progress=True,
        on_cases=lambda n: print(f"{model.cfg.model_name}: {n} usable cases of {len(records)} facts"),
        **_changes(args),
    )
    directory = results / (args.run or _run_name(args, result))
    result.save(directory)
    table = findings(result)
    write_csv_atomic(table, directory / "findings.csv")
    comparison = None
    if _published_name(args.model) in published_models() and "final" in result.places:
        comparison = compare_published(result, _published_name(args.model))
        write_csv_atomic(comparison, directory / "published.csv")
    report = write_tracing_report(directory, result.identity, table, conclusion(result), choice_stability(result), comparison)
    _print(result, table)
    print(f"\n{conclusion(result)}\n\nreport: {report}")
    return directory


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the protocol that options change."""
    options = {
        "corruption": args.corruption,
        "positions": args.positions,
        "foils": args.foils,
        "instruction": args.chat,
        "sigma": args.sigma,
        "draws": args.draws,
        "n_cases": args.cases,
        "min_cases": args.min_cases,
        "search": args.search,
        "token_rule": args.token_rule,
        "prepend_bos": args.bos,
        "seed": args.seed,
    }
    filters = {"min_margin": None, "min_drop": None} if args.unfiltered else {}
    return {name: value for name, value in options.items() if value is not None} | filters


def _published_name(model: str) -> str:
    """The last part of a model's hub id, by which numbers were published."""
    located = locate(model)
    return (located.hub_id or model).rpartition("/")[2]


def _run_name(args: argparse.Namespace, result: TracingResult) -> str:
    """The same settings give the same name."""
    settings = json.dumps({**result.identity, "facts": args.facts}, sort_keys=True)
    facts = "".join(letter if letter.isalnum() else "-" for letter in Path(args.facts).stem)
    return f"trace-{facts}-{result.protocol.corruption}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def _print(result: TracingResult, table: pa.Table) -> None:
    place = None
    print(f"\n{'':40} layer expert    n      mean  95% interval")
    for row in table.to_pylist():
        if row["mean"] is None or (row["expert"] is None and row["quantity"] not in SHOWN):
            continue
        if row["place"] != place and len(result.places) > 1:
            print(f"\n{PLACES[row['place']]}:")
        place = row["place"]
        layer, expert = ("" if row[name] is None else row[name] for name in ("layer", "expert"))
        interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        print(f"{row['quantity']:<40} {layer:>5}{expert:>7}{row['n']:>5}  {row['mean']:+8.3f}  {interval}  {row['unit']}")


SHOWN = {"clean margin", "drop by corruption", "all MLP outputs together", "MLP output", "routed experts"}
"""Of what is of no single expert, what the terminal shows; findings.csv has all of it."""
