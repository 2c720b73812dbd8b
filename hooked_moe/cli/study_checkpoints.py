"""How an audit's numbers grow with training: one audit of every checkpoint of a run.

    hooked-moe study checkpoints --models build/tiny-olmoe-run/step-50 build/tiny-olmoe-run/step-100 build/tiny-olmoe-run/step-200
    hooked-moe study checkpoints --model olmoe --revisions step5000-tokens20B step50000-tokens209B main --stream --delete-after
    hooked-moe study checkpoints --model olmoe --revisions log-spaced --stream --delete-after --documents 24 --layers 0,7,15

Any list of directories or revisions of one architecture. Revisions are checked to exist before the first is downloaded. Each is
audited in the reduced form (--tokens of every document; for models in memory also one pruning), and what was audited is not
audited again. Written to --out: checkpoints.csv (every response by layer, with intervals over documents), report.html and
figures/.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from hooked_moe.analysis.responses import audit_responses
from hooked_moe.cli.options import DTYPES, choose_device, dtype_named, parse_layers
from hooked_moe.cli.reduced_audit import AuditForm, reduced_audit
from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.registry import locate
from hooked_moe.loading.revisions import check_revisions, delete_revision
from hooked_moe.model import HookedMoE
from hooked_moe.report.checkpoint_page import write_checkpoint_report
from hooked_moe.surgery.grafting import check_same_architecture
from hooked_moe.tables import CHECKPOINTS, read_csv, read_json, table_with_schema, write_csv_atomic, write_json_atomic

LOG_SPACED = "log-spaced"
OLMOE_STEPS = {
    5_000: 20, 10_000: 41, 25_000: 104, 50_000: 209, 100_000: 419, 200_000: 838, 400_000: 1677, 600_000: 2516, 800_000: 3355,
    1_220_000: 5117,
}  # fmt: skip
"""Ten checkpoints of OLMoE-1B-7B-0924: step and billions of tokens, as its branches are named."""


class Checkpoint(NamedTuple):
    """One model of the list, and how far its training had come."""

    label: str
    step: int
    name: str
    revision: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", metavar="NAME", help="models: names, or directories")
    parser.add_argument("--model", help="with --revisions: a model on the hub")
    parser.add_argument("--revisions", nargs="+", metavar="REV", help="branches, tags or commits; log-spaced: ten of OLMoE's 244")
    parser.add_argument("--steps", nargs="+", type=int, help="their training steps, where names and recipe.json do not say them")
    parser.add_argument("--layers", default="all", help="comma-separated layers, or all (default)")
    parser.add_argument("--corpus", default="held-out", help="as in `hooked-moe audit` (default: %(default)s)")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents")
    parser.add_argument("--tokens", type=int, default=64, help="of each document (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="keep one block in memory at a time; without prunings")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--delete-after", action="store_true", help="delete a revision from the hub's cache once it is audited")
    parser.add_argument(
        "--out", type=Path, default=Path("results/studies/checkpoints"), help="where to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> Path:
    """The whole study; returns the report's path."""
    checkpoints = listed(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoints.csv"
    rows: list[dict[str, Any]] = read_csv(path, CHECKPOINTS).to_pylist() if path.is_file() else []
    check_settings(args, path)
    first: HookedMoEConfig | None = None
    for checkpoint in checkpoints:
        if any(row["checkpoint"] == checkpoint.label for row in rows):
            print(f"{checkpoint.label}: audited before")
            continue
        device = choose_device(args.device)
        model = HookedMoE.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            stream=args.stream,
            dtype=dtype_named(args.dtype, device),
            device=device,
        )
        first = first or model.cfg
        check_same_architecture(first, model.cfg)
        rows += _audited(model, checkpoint, args)
        rows.sort(key=lambda row: row["step"])  # of equal steps, the order stays
        write_csv_atomic(table_with_schema(CHECKPOINTS, pa.Table.from_pylist(rows).to_pydict()), path)
        commit = model.cfg.revision
        del model
        if args.delete_after and commit is not None:
            freed = delete_revision(locate(checkpoint.name).model_name, commit)
            print(f"{checkpoint.label}: deleted from the cache, {freed / 1e9:.1f} GB")
    report = write_checkpoint_report(args.out)
    print(f"report: {report}")
    return report


def check_settings(args: argparse.Namespace, table: Path) -> None:
    """Record by what checkpoints are audited. Raises `ValueError` where some were audited by other settings."""
    path, names = args.out / "settings.json", ("model", "layers", "corpus", "documents", "tokens", "dtype")
    settings = {name: getattr(args, name) for name in names}
    if table.is_file():
        before = read_json(path) if path.is_file() else {}
        other = [name for name in names if before.get(name, ...) != settings[name]]
        if other:
            were = ", ".join(f"--{name} {before.get(name)}" for name in other)
            raise ValueError(f"{table} is of other settings ({were}): give these again, or another --out")
    write_json_atomic(settings, path)


def _audited(model: HookedMoE, checkpoint: Checkpoint, args: argparse.Namespace) -> list[dict[str, Any]]:
    form = AuditForm(
        layers=parse_layers(args.layers, model.cfg), corpus=args.corpus, documents=args.documents, tokens=args.tokens
    )
    model.cfg = replace(model.cfg, model_name=re.sub(r"[^\w.-]", "-", checkpoint.label))
    directory = reduced_audit(model, form, args.out / "audits", "reduced")
    print(f"{checkpoint.label}: audited")
    return [
        {"checkpoint": checkpoint.label, "step": checkpoint.step, **response._asdict()} for response in audit_responses(directory)
    ]


def listed(args: argparse.Namespace) -> list[Checkpoint]:
    """The checkpoints asked for, by step. Raises `ValueError` for options that do not go together, and for revisions that do not
    exist or do not say their step."""
    if (args.models is None) == (args.model is None) or (args.model is None) != (args.revisions is None):
        raise ValueError("give --models DIRECTORY ..., or --model NAME with --revisions REV ...")
    if args.delete_after and args.model is None:
        raise ValueError("--delete-after is for revisions on the hub: directories are yours, and stay")
    if args.model is not None:
        revisions = [
            name for revision in args.revisions for name in (_olmoe_revisions() if revision == LOG_SPACED else [revision])
        ]
        hub_id = locate(args.model).hub_id
        if hub_id is None:
            raise ValueError(f"--revisions are of a model on the hub, and {args.model!r} is none: give --models")
        check_revisions(hub_id, revisions)
        named = [(revision, args.model, revision) for revision in revisions]
    else:
        named = [(str(name), str(name), None) for name in args.models]
    steps = args.steps or [_step_of(label) for label, _, _ in named]
    if len(steps) != len(named):
        raise ValueError(f"--steps gives {len(steps)} numbers for {len(named)} checkpoints")
    found = [Checkpoint(label, step, name, revision) for (label, name, revision), step in zip(named, steps, strict=True)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _olmoe_revisions() -> list[str]:
    return [f"step{step}-tokens{tokens}B" for step, tokens in OLMOE_STEPS.items()]


def _step_of(name: str) -> int:
    """From a directory's recipe.json, or from a name such as step5000-tokens20B."""
    recipe = Path(name) / "recipe.json"
    if recipe.is_file():
        values = json.loads(recipe.read_text(encoding="utf-8"))
        if "step" in values:
            return int(values["step"])
    match = re.search(r"step-?(\d+)", name)
    if match is None:
        raise ValueError(f"{name} does not say its training step: give --steps, one number for each checkpoint")
    return int(match[1])
