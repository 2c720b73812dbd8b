"""Remove every routed expert at every token, one at a time, and ask what the routing statistics knew about it.

    python -m experiments.audit                                     # the shipped model on the shipped corpus
    python -m experiments.audit --model olmoe --corpus wikitext-2 --layers 0,4,7,11,15 --positions 200

Verify -> measure -> analyse -> report. Results go to results/<model>/<run>/: tables as parquet and csv, report.html with
figures, manifest.json. A killed run goes on where it stopped when the same command is given again, to the same bytes.
Protocol of arXiv 2606.10703 in its stated form: expert removed at the token only, output zeroed, routed experts only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.analysis import analyse_run
from hooked_moe.cell_text import terminal_table
from hooked_moe.cells import sample_positions
from hooked_moe.corpus import load_corpus
from hooked_moe.criteria import CRITERIA
from hooked_moe.fingerprint import config_values, versions, weights_sha256
from hooked_moe.measurement import Plan, TokenizedCorpus, measure, remove_shards
from hooked_moe.report import write_report
from hooked_moe.statistics import minimum_documents
from hooked_moe.tables import remove_temporaries, write_json_atomic
from hooked_moe.verification import MINIMUM_TOKENS, noise_floor, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLE_SIZE, SEED = 200, 42


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-olmoe", help="short name, hub id or local directory (default: %(default)s)")
    parser.add_argument(
        "--corpus", default="held-out", help="held-out, wikitext-2, or a .txt or .jsonl file (default: %(default)s)"
    )
    parser.add_argument("--layers", default="all", help="comma-separated layers, or all (default)")
    parser.add_argument("--positions", default="all", help="all (default), or how many to sample: the paper's sample is 200")
    parser.add_argument(
        "--scope", choices=["position", "both"], default="position", help="both: also remove experts sequence-wide"
    )
    parser.add_argument("--removal", choices=["zero", "renormalize", "reroute"], default="zero")
    parser.add_argument("--context", type=int, help="tokens per window (default: the model's context, 512 at most)")
    parser.add_argument(
        "--tokens", default="512", help="tokens of each document: a number (default: %(default)s, the paper's), or all"
    )
    parser.add_argument("--documents", type=int, help="only the first so many documents of the corpus")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="of the weights (default: %(default)s); compare the noise floor in half precision",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="keep one block of the model in memory at a time, for models larger than memory; residuals wait on disk",
    )
    parser.add_argument("--memory", metavar="BYTES", help="bound the memory beside the model's weights, as in 4GB")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--revision", help="commit or branch of the model on the hub")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go (default: %(default)s)")
    parser.add_argument("--run", help="name of the run (default: from its settings, so that the same command resumes it)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a sign of the table shows "?"
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> Path:
    """The whole audit; returns the run's directory. Raises `ValueError` and `OSError` that say what to do."""
    started = time.perf_counter()
    check_run_name(args.run)
    device = choose_device(args.device)
    model = HookedMoE.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], device=device, revision=args.revision, stream=args.stream
    )
    corpus = load_corpus(args.corpus)
    if args.documents is not None:
        if not 1 <= args.documents <= len(corpus.documents):
            raise ValueError(f"--documents {args.documents}: corpus {corpus.name!r} has {len(corpus.documents)} documents")
        corpus = dataclasses.replace(corpus, documents=corpus.documents[: args.documents])
    n_ctx = min(model.cfg.n_ctx, 512) if args.context is None else args.context
    if args.context is not None and not MINIMUM_TOKENS <= n_ctx <= model.cfg.n_ctx:
        raise ValueError(
            f"--context {n_ctx}: give a number from {MINIMUM_TOKENS} to {model.cfg.n_ctx}, the context of {args.model}"
        )
    tokenized = TokenizedCorpus(model, corpus, n_ctx, parse_tokens(args.tokens))
    layers = parse_layers(args.layers, model.cfg)
    valid = tokenized.valid_positions()
    sample = parse_sample(args.positions, valid)
    plan = Plan(layers, ("position", "sequence") if args.scope == "both" else ("position",), args.removal, n_ctx, sample)
    manifest = describe(args, model, tokenized, plan)

    directory = open_run(args, manifest)
    shared = "" if model.cfg.d_shared is None else ", and shared experts, which stay"
    print(
        f"{model.cfg.model_name}: {len(layers)} layers of {model.cfg.num_experts} experts, {model.cfg.experts_per_token} active"
        f"{shared}"
    )
    extent = "" if args.tokens == "all" else f" (of each the first {args.tokens} at most)"
    print(f"{corpus.name}: {len(corpus.documents)} documents, {sum(tokenized.lengths()):,} tokens{extent}")
    positions = valid if sample is None else sample
    removals = len(positions) * len(layers) * model.cfg.experts_per_token
    print(f"removals to measure: {removals:,}\nresults: {directory}")
    needed = minimum_documents(len(CRITERIA) * len(layers))
    if len({document for document, _ in positions}) < needed:
        print(f"note: tests over documents need {needed} or more of them and will be refused; those over positions are made")
    print()

    if not (directory / "manifest.json").exists():
        manifest |= check(model, tokenized, plan)
        measure(model, tokenized, plan, directory, memory_budget=args.memory)
        write_json_atomic(manifest, directory / "manifest.json")
    remove_shards(directory)

    n_sample = min(SAMPLE_SIZE, len(positions))
    cells = analyse_run(directory, n_experts=model.cfg.num_experts, layers=layers, n_positions=n_sample, seed=SEED)
    report = write_report(directory)
    print(terminal_table(cells))
    print(f"\n{removals:,} removals; {time.perf_counter() - started:.0f} s in all\nreport: {report}")
    return directory


def check_run_name(name: str | None) -> None:
    if name is not None and (name == ".." or Path(name).name != name or not name):
        raise ValueError(f"--run {name!r}: give a plain name; it becomes a directory under --results")


def choose_device(name: str | None) -> torch.device:
    """The device asked for, once it has been seen to work; else a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either, according to how it was built
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used here ({reason}); leave it out, or give cpu") from error
    return torch.device(name)


def parse_layers(text: str, cfg: HookedMoEConfig) -> tuple[int, ...]:
    """The layers to audit; "all" means all that have experts."""
    if text == "all":
        return tuple(cfg.moe_layers)
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--layers {text!r}: give numbers separated by commas, as in 0,4,7, or all") from None
    for layer in layers:
        if not 0 <= layer < cfg.n_layers:
            raise ValueError(f"--layers: layer {layer} is out of range; the model has layers 0 to {cfg.n_layers - 1}")
        if not cfg.experts_in(layer):
            raise ValueError(f"--layers: layer {layer} is dense, it has no experts; layers {cfg.moe_layers} have")
    return tuple(layers)


def parse_tokens(text: str) -> int | None:
    """How many tokens of each document to read; None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < MINIMUM_TOKENS:
        raise ValueError(f"--tokens {text!r}: give all, or a number of tokens from {MINIMUM_TOKENS}")
    return int(text)


def parse_sample(text: str, valid: list[tuple[int, int]]) -> frozenset[tuple[int, int]] | None:
    """The positions to measure: None for all, or the paper's kind of sample, frozen by its seed."""
    if text == "all":
        return None
    if not text.isdecimal() or not 3 <= int(text) <= len(valid):
        raise ValueError(
            f"--positions {text!r}: give all, or a number from 3 to {len(valid)}, the valid positions of this corpus"
        )
    return frozenset(valid[index] for index in sample_positions(len(valid), int(text), SEED))


def describe(args: argparse.Namespace, model: HookedMoE, tokenized: TokenizedCorpus, plan: Plan) -> dict[str, Any]:
    """What identifies a run: two runs with the same description give the same tables."""
    corpus = tokenized.corpus
    return {
        "format": 1,
        "model": {
            "name": model.cfg.model_name,
            "source": str(args.model),
            "revision": model.cfg.revision,
            "weights_sha256": weights_sha256(model),
            "config": config_values(model.cfg),
        },
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "documents": len(corpus.documents),
            "tokens": sum(tokenized.lengths()),
            "tokens_sha256": tokenized.sha256(),
        },
        "protocol": {
            "name": "defined",
            "scopes": list(plan.scopes),
            "removal": plan.removal,
            "layers": list(plan.layers),
            "context": plan.n_ctx,
            "tokens_per_document": args.tokens,
            "positions": "all" if plan.sample is None else len(plan.sample),
            "analysis_sample": SAMPLE_SIZE,
            "seed": SEED,
        },
        "versions": versions(),
    }


def open_run(args: argparse.Namespace, description: dict[str, Any]) -> Path:
    """The run's directory, new or to be resumed; refuses one that was begun with other settings."""
    text = json.dumps(description, sort_keys=True)
    name = args.run or f"{Path(args.corpus).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    directory = args.results / Path(description["model"]["name"]).name / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the directory {directory}: {error.strerror}; give --results a directory that can be written"
        raise OSError(error.errno, reason) from error
    for part in (directory, directory / "shards", directory / "figures"):
        remove_temporaries(part)
    plan = directory / "plan.json"
    if not plan.exists():
        write_json_atomic(description, plan)
    found, wanted = read_plan(plan), json.loads(text)
    if found != wanted:
        changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise ValueError(
            f"{directory} was begun with another {' and '.join(changed)}: give another --run, or remove the directory "
            "to start anew"
        )
    return directory


def read_plan(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); remove the directory to start anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; remove the directory to start anew")
    return found


def check(model: HookedMoE, tokenized: TokenizedCorpus, plan: Plan) -> dict[str, Any]:
    """Verification and noise floor, for the manifest. Raises `ValueError` if a check fails: nothing is measured then."""
    windows = [window.tokens for windows in tokenized.documents for window in windows]
    windows.sort(key=len, reverse=True)
    if len(windows[0]) < MINIMUM_TOKENS:
        raise ValueError(
            f"the longest document of {tokenized.corpus.name!r} has {len(windows[0])} tokens, and verifying the model takes "
            f"{MINIMUM_TOKENS}: give a corpus with longer documents"
        )
    length = min(len(windows[0]), 128)
    alike = [window[:length] for window in windows if len(window) >= length][:4]
    checks = verify(model, torch.from_numpy(windows[0][None]), plan.removal, plan.scopes)
    for one in checks:
        print(f"  {'pass' if one.passed else 'FAIL'}  {one.name}: {one.value:.3g} (threshold {one.threshold:.3g}) - {one.detail}")
    failed = [one.name for one in checks if not one.passed]
    if failed:
        raise ValueError(f"verification failed ({', '.join(failed)}); nothing was measured, for the effects could not be trusted")
    floor = noise_floor(model, torch.from_numpy(np.stack(alike)))
    print(f"  noise floor: {floor:.3g} nats\n")
    return {
        "verification": [dataclasses.asdict(one) for one in checks],
        "noise_floor": {"max_abs_nats": floor, "windows": len(alike), "tokens_per_window": length},
    }


if __name__ == "__main__":
    sys.exit(main())
