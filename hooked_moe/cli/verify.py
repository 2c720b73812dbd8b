"""Check whether a checkpoint is the model that it says it is, and is run here as transformers runs it.

    hooked-moe verify --model tiny-olmoe
    hooked-moe verify --model allenai/OLMoE-1B-7B-0924 --json olmoe.json
    hooked-moe verify --model ~/models/olmoe --expect olmoe --skip-half     # a copy of a published checkpoint

This counts the tensors; compares logits that are published; runs the verifications that gate every audit; compares losses and
routing with transformers, where it is installed; and half precision with float32. One model is in memory at a time, 4 bytes a
parameter at most; transformers needs more than twice that while it loads: --skip-transformers. The exit code is 1 if a check
failed or the model could not be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_moe.cli import parity_checks
from hooked_moe.cli.console import parser_of, run_command, whole_number
from hooked_moe.cli.options import DTYPES, choose_device
from hooked_moe.cli.parity_checks import Result, not_run
from hooked_moe.cli.published_checkpoints import PUBLISHED, Published, published
from hooked_moe.config import HookedMoEConfig
from hooked_moe.corpus import load_corpus
from hooked_moe.loading.beside import read_tokenizer
from hooked_moe.loading.fingerprint import versions
from hooked_moe.loading.hub import download
from hooked_moe.loading.pretrained import read_config
from hooked_moe.loading.registry import locate
from hooked_moe.measurement.verification import MINIMUM_TOKENS
from hooked_moe.model import HookedMoE
from hooked_moe.tables import write_json_atomic
from weights_conversion import CheckpointError, Conversion


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("verify", __doc__)
    parser.add_argument("--model", default="tiny-olmoe", help="short name, hub id or local directory (default: %(default)s)")
    parser.add_argument("--revision", help="commit or branch of the model on the hub")
    parser.add_argument(
        "--expect", choices=sorted(PUBLISHED), help="the published checkpoint that a local directory is said to be a copy of"
    )
    parser.add_argument("--tokens", type=whole_number, default=256, help="tokens of held-out text (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="of the main run (default: %(default)s); golden logits and transformers are compared in float32 only",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--skip-transformers", action="store_true", help="do not compare with transformers")
    parser.add_argument("--skip-half", action="store_true", help="do not check bfloat16 and float16")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments), resumes=False)


def run(args: argparse.Namespace) -> int:
    """Check, print as it goes, and return the exit code."""
    if args.tokens < MINIMUM_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: give {MINIMUM_TOKENS} or more")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: there is no directory {args.json.absolute().parent}")
    subject = find(args)
    tokens, text = read_text(subject, args.tokens)
    print(f"{subject.name}: {subject.cfg.model_type}, {subject.cfg.n_layers} layers; {subject.directory}")
    print(f"text: {text}\n")
    results = []
    for result in all_checks(args, subject, tokens):
        print(as_line(result), flush=True)
        results.append(result)
    print(f"\n{summary(results)}")
    if args.json is not None:
        write_json_atomic(as_json(subject, text, results), args.json)
    return int(any(result.outcome == "failed" for result in results))


# --- what is checked -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The model to check: found and downloaded, its weights not yet read."""

    name: str
    directory: Path
    revision: str | None
    device: torch.device
    conversion: Conversion
    cfg: HookedMoEConfig
    expected: Published | None
    """What is published about this checkpoint."""

    def load(self, dtype: torch.dtype) -> HookedMoE:
        return HookedMoE.from_pretrained(self.directory, dtype=dtype, device=self.device)


def find(args: argparse.Namespace) -> Subject:
    """Raises what `HookedMoE.from_pretrained` raises for a name that leads to no model."""
    location = locate(args.model)
    directory, revision = location.directory, None
    if location.hub_id is not None:
        directory, revision = download(location.hub_id, args.revision, None, False, check_config=read_config)
    elif args.revision is not None:
        raise ValueError(f"--revision {args.revision!r} is for models on the hub; {args.model!r} is the directory {directory}")
    assert directory is not None
    conversion, cfg = read_config(directory / "config.json")
    expected = PUBLISHED[args.expect] if args.expect else published(location.hub_id)
    return Subject(location.model_name, directory, revision, choose_device(args.device), conversion, cfg, expected)


def read_text(subject: Subject, length: int) -> tuple[Tensor, str]:
    """Tokens [1, pos] of the shipped held-out corpus, and what they are; random ones for a model without tokenizer."""
    length = min(length, subject.cfg.n_ctx)
    tokenizer = read_tokenizer(subject.directory, subject.cfg)
    if tokenizer is None:
        tokens = torch.randint(subject.cfg.d_vocab, (1, length), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        return tokens, f"{length} random token ids, for there is no tokenizer.json"
    for document in load_corpus("held-out").documents:
        ids = tokenizer.encode(document.text)[:length]
        if len(ids) == length:
            tokens = torch.tensor([ids], dtype=torch.long, device="cpu")
            return tokens, f"{length} tokens of {document.title!r} in the held-out corpus"
    raise ValueError(f"--tokens {length}: no document of the held-out corpus is that long; give fewer")


def all_checks(args: argparse.Namespace, subject: Subject, tokens: Tensor) -> Iterator[Result]:
    """In an order that holds one model at a time. A checkpoint that cannot be loaded ends the checks."""
    try:
        yield from check_files(subject)
        ours = yield from check_model(args, subject, tokens)
        yield from check_against_transformers(args, subject, tokens, ours)
        yield from check_half_precision(args, subject, tokens)
    except CheckpointError as error:
        yield Result("loading", "failed", str(error))


def check_files(subject: Subject) -> Iterator[Result]:
    if subject.expected is not None:
        yield from parity_checks.census(subject.directory, subject.expected)
    else:
        yield not_run("census", f"only for the published checkpoints; for a copy of one, --expect {'|'.join(PUBLISHED)}")
    yield from parity_checks.tensors_on_disk(subject.directory, subject.conversion, subject.cfg)


def check_model(args: argparse.Namespace, subject: Subject, tokens: Tensor) -> Generator[Result, None, parity_checks.Run]:
    """Returns, besides, the model's run, for comparison with transformers."""
    model = subject.load(DTYPES[args.dtype])
    if subject.expected is None or not subject.expected.golden_logits:
        known = " and ".join(entry.hub_id for entry in PUBLISHED.values() if entry.golden_logits)
        yield not_run("golden logits", f"published for {known} only")
    elif args.dtype != "float32":
        yield not_run("golden logits", f"they are of float32, and this is --dtype {args.dtype}")
    else:
        yield parity_checks.golden_logits(model, subject.expected)
    yield from parity_checks.verifications(model, tokens)
    return parity_checks.our_run(model, tokens)


def check_against_transformers(
    args: argparse.Namespace, subject: Subject, tokens: Tensor, ours: parity_checks.Run
) -> Iterator[Result]:
    why = why_not_transformers(args)
    if why is None and args.dtype != "float32":
        why = f"compared in float32 only, and this is --dtype {args.dtype}"
    if why is not None:
        yield not_run("transformers", why)
        return
    theirs = parity_checks.transformers_run(subject.directory, torch.float32, subject.device, tokens, subject.cfg.moe_layers)
    yield from parity_checks.same_as_transformers(ours, theirs)


def check_half_precision(args: argparse.Namespace, subject: Subject, tokens: Tensor) -> Iterator[Result]:
    if args.skip_half:
        yield not_run("half precision", "--skip-half")
        return
    for dtype in (torch.bfloat16, torch.float16):
        ours, results = parity_checks.half_precision(subject.load, dtype, tokens)
        yield from results
        if dtype == torch.float16:
            continue  # transformers' choice of half precision is bfloat16
        why = why_not_transformers(args)
        if why is not None:
            yield not_run("bfloat16: routing of transformers", why)
        else:
            theirs = parity_checks.transformers_run(subject.directory, dtype, subject.device, tokens, subject.cfg.moe_layers)
            yield parity_checks.half_against_transformers(ours, theirs, dtype)


def why_not_transformers(args: argparse.Namespace) -> str | None:
    return "--skip-transformers" if args.skip_transformers else parity_checks.why_without_transformers()


# --- the report ----------------------------------------------------------------------------------------------------------


def as_line(result: Result) -> str:
    if result.value is None or result.threshold is None:
        return f"  {result.outcome:7}  {result.name}: {result.detail}"
    value, threshold = as_text(result.value), as_text(result.threshold)
    return f"  {result.outcome:7}  {result.name}: {value} ({result.relation} {threshold}) - {result.detail}"


def as_text(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def summary(results: list[Result]) -> str:
    outcomes = [result.outcome for result in results]
    counts = f"{outcomes.count('passed')} passed, {outcomes.count('failed')} failed, {outcomes.count('not run')} not run"
    failed = ", ".join(result.name for result in results if result.outcome == "failed")
    return f"{counts}: {failed}" if failed else counts


def as_json(subject: Subject, text: str, results: list[Result]) -> dict[str, Any]:
    return {
        "model": {"name": subject.name, "revision": subject.revision, "model_type": subject.cfg.model_type},
        "text": text,
        "checks": [{key: finite(value) for key, value in dataclasses.asdict(result).items()} for result in results],
        "summary": summary(results),
        "versions": versions() | {"transformers": parity_checks.transformers_version()},
    }


def finite(value: Any) -> Any:
    """JSON has no word for nan and infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
