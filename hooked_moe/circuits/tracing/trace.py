"""`trace_facts`: facts in, the effect of every patch of every expert out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hooked_moe.circuits.tracing.batches import batches
from hooked_moe.circuits.tracing.cases import find_cases
from hooked_moe.circuits.tracing.measure import measure
from hooked_moe.circuits.tracing.patches import SITES
from hooked_moe.circuits.tracing.protocol import protocol_of
from hooked_moe.circuits.tracing.readings import READINGS, check_readings
from hooked_moe.circuits.tracing.result import TracingResult
from hooked_moe.circuits.tracing.tables import blocks_table, cases_table, experts_table
from hooked_moe.corpus import FactRecord
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

PATCH_BYTES = 256 << 20
"""Bytes of patches in memory at a time."""


@torch.no_grad()
def trace_facts(
    model: Transformer,
    records: Iterable[FactRecord],
    *,
    protocol: str = "defined",
    readouts: Sequence[str] = READINGS,
    necessity: bool = True,
    memory_budget: int | str | None = None,
    progress: bool = False,
    on_cases: Callable[[int], Any] | None = None,
    **changes: Any,
) -> TracingResult:
    """Which expert carries the facts: every patch of every expert at the last token, over up to `n_cases` facts.

    `protocol` is "defined", or "as_published" for what arXiv 2606.03780 did; any field of `Protocol` changes it
    (`corruption="noise"`, `sigma=2.0`, `n_cases=64`, ...). `readouts` are those of `readings.READINGS`; "logit_difference" alone
    spares the products with the whole vocabulary. `necessity` also removes every active expert from the clean run.
    `memory_budget` bounds what the engine holds beside the weights. A record without a foil gets one
    (`hooked_moe.corpus.with_foils`).

        result = trace_facts(model, load_facts("embedded"), corruption="noise")
        chosen = result.selection                                            # chosen on half of the cases
        result.validated(result.expert(chosen.layer, chosen.expert))         # its rescue on the other half, in logits

    Cost: two forwards a corrupted run, and for each of its patches one token through the later layers, about 1/(2T) of a forward
    of T tokens. Raises `ValueError` for unknown options, subjects that are not in their prompts, a tokenizer that leaves BOS
    open, and fewer usable cases than `min_cases`.
    """
    settings = protocol_of(protocol, changes)
    readings = check_readings(readouts)
    cases = find_cases(model, records, settings)
    if on_cases is not None:
        on_cases(cases.n_cases)
    rows = max(4, min(128, PATCH_BYTES // _patch_bytes(model)))
    measured = []
    with progress_bar(len(cases.runs), "tracing", "run", shown=progress) as bar:
        for batch in batches(model, cases.runs, settings, cases.sigma, rows):
            measured.append(measure(model, batch, readings, memory_budget, necessity))
            bar.update(len(batch.runs))
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
        "begins_with_bos": _begins_with_bos(model, cases.runs[0].prompt.tokens),
        "excluded": dict(cases.excluded),
    }
    return TracingResult(cases_table(measured), blocks_table(measured, readings), experts_table(measured, readings), identity)


def _patch_bytes(model: Transformer) -> int:
    """Bytes of all patches of one corrupted run."""
    cfg = model.cfg
    variants = len(SITES) + 6 * cfg.experts_per_token
    return 4 * cfg.n_layers * variants * cfg.d_model


def _begins_with_bos(model: Transformer, tokens: Sequence[int]) -> bool:
    bos = model.require_tokenizer().bos_id
    return bos is not None and tokens[0] == bos
