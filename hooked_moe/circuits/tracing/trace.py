"""`trace_facts`: facts in, the effect of every patch of every expert out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hooked_moe.circuits.tracing.batches import CorruptedRun
from hooked_moe.circuits.tracing.cases import find_cases
from hooked_moe.circuits.tracing.patches import n_variants
from hooked_moe.circuits.tracing.places import places_of
from hooked_moe.circuits.tracing.protocol import Protocol, protocol_of
from hooked_moe.circuits.tracing.readings import READINGS, check_readings
from hooked_moe.circuits.tracing.result import TracingResult
from hooked_moe.circuits.tracing.tables import blocks_table, cases_table, experts_table
from hooked_moe.circuits.tracing.units import TraceBatches, trace_batches
from hooked_moe.components.precision import without_autocast
from hooked_moe.corpus import FactRecord
from hooked_moe.executors import Executor
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

PATCH_BYTES = 256 << 20
"""Bytes of patches in memory at a time."""


@torch.no_grad()
@torch.inference_mode(False)
@without_autocast()
def trace_facts(
    model: Transformer,
    records: Iterable[FactRecord],
    *,
    protocol: str = "defined",
    readouts: Sequence[str] = READINGS,
    necessity: bool = True,
    discovery: Collection[int] | None = None,
    memory_budget: int | str | None = None,
    executor: Executor | None = None,
    directory: Path | None = None,
    progress: bool = False,
    on_cases: Callable[[int], Any] | None = None,
    **changes: Any,
) -> TracingResult:
    """Which expert carries the facts: every patch of every expert at the last token, over up to `n_cases` facts.

    `protocol` is "defined", or "as_published" for what arXiv 2606.03780 did; any field of `Protocol` changes it
    (`corruption="noise"`, `positions="all"`, `n_cases=64`, ...). `readouts` are those of `readings.READINGS`; "logit_difference"
    alone spares the products with the whole vocabulary. `necessity` also removes every active expert from the clean run.
    `discovery` are the case ids that an expert is chosen on, all others testing it; None: a half of them, drawn by the seed.
    `memory_budget` bounds what the engine holds beside the weights. `executor` says where batches of cases are traced (None:
    here). In `directory`, which all its workers must see, the numbers of every batch are kept for the while: the same call goes
    on from there after it was interrupted (None: nothing is kept). `progress` shows bars. A record without a foil gets one
    (`hooked_moe.corpus.with_foils`).

        result = trace_facts(model, load_facts("embedded"), corruption="noise")
        chosen = result.selection                                            # chosen on half of the cases
        result.validated(result.expert(chosen.layer, chosen.expert))         # its rescue on the other half, in logits
        result = trace_facts(model, load_facts("embedded"), positions="all") # every token from the subject on
        result.at("subject_last").site("moe_out")                            # [case, layer]

    Cost: two forwards a corrupted run, and for each of its patches at the last token one token through the later layers, about
    1/(2T) of a forward of T tokens. A patch n tokens before the last is n + 1 tokens through the later layers.

    Raises `ValueError` for unknown options, subjects that are not in their prompts, a tokenizer that leaves BOS open, and fewer
    usable cases than `min_cases`, or than half of that on either side of a split that is given.
    """
    settings = protocol_of(protocol, changes)
    readings = check_readings(readouts)
    cases = find_cases(model, records, settings, progress)
    if on_cases is not None:
        on_cases(cases.n_cases)
    _check_split(cases.runs, settings, discovery)
    spots = max(len(places_of(run.prompt, settings.positions)) for run in cases.runs)
    rows = max(4, min(128, PATCH_BYTES // (spots * _patch_bytes(model))))
    groups = [cases.runs[start : start + rows] for start in range(0, len(cases.runs), rows)]
    task = TraceBatches(groups, settings, cases.sigma, readings, memory_budget, necessity)
    with progress_bar(len(cases.runs), "tracing", "run", shown=progress) as bar:
        parts = trace_batches(model, task, executor, directory, bar.update)
    cfg = model.cfg
    identity = {
        "model": cfg.model_name,
        "model_type": cfg.model_type,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "n_layers": cfg.n_layers,
        "n_experts": max(cfg.experts_in(layer) for layer in cfg.moe_layers),
        "experts_per_token": cfg.experts_per_token,
        "protocol": settings.as_metadata(),
        "protocol_name": protocol,
        "readouts": list(readings),
        "sigma": cases.sigma,
        "split": "by the seed" if discovery is None else "given",
        "begins_with_bos": _begins_with_bos(model, cases.runs[0].prompt.tokens),
        "excluded": dict(cases.excluded),
    }
    return TracingResult(
        cases_table(parts, settings.seed, discovery), blocks_table(parts, readings), experts_table(parts, readings), identity
    )


def _check_split(runs: Sequence[CorruptedRun], protocol: Protocol, discovery: Collection[int] | None) -> None:
    """Raise `ValueError` where a split that was given leaves too few cases on one side."""
    if discovery is None:
        return
    ids = {run.case: run.prompt.record.case_id for run in runs}.values()
    chosen_on = sum(case in discovery for case in ids)
    least = min(protocol.min_cases, protocol.n_cases) // 2
    if min(chosen_on, len(ids) - chosen_on) < least:
        raise ValueError(
            f"of {len(ids)} usable cases {chosen_on} are of the discovery split and {len(ids) - chosen_on} are not; at least "
            f"{least} are needed on either side. Give more facts, another split or a lower min_cases"
        )


def _patch_bytes(model: Transformer) -> int:
    """Bytes of all patches of one token."""
    cfg = model.cfg
    return 4 * cfg.n_layers * n_variants(cfg.experts_per_token) * cfg.d_model


def _begins_with_bos(model: Transformer, tokens: Sequence[int]) -> bool:
    bos = model.require_tokenizer().bos_id
    return bos is not None and tokens[0] == bos
