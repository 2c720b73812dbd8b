"""A plain forward, and one that keeps all activations, against transformers and TransformerLens.

    python -m benchmarks.forward                        # context 512, 8 layers, 64 experts top-8, d_model 256
    python -m benchmarks.forward --batches 1 --d-model 1024 --d-expert 512 --threads 1
    python -m benchmarks.forward --small                # seconds; shows that it works, measures nothing

The same random weights in the same process, by turns. transformers runs with its fastest kernels (sdpa attention, grouped_mm
experts) and with its plainest (eager). Our logits are in float32 in any case; in bfloat16, theirs are not.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE

OURS_ALONE = re.compile(r"hook_result$|mlp.hook_expert_(pre|pre_linear|post|out)$|experts.\d+.hook_out$")
"""Hook points that TransformerLens has nothing like."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 5e-5
"""Of logits in float32, which are a few units large here."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, peers.SMALL | {"context": 32, "batches": [1, 2]})
    with threads(args.threads):
        reference = peers.random_olmoe(args, args.context)
        setting = f"context {args.context}, {peers.model_in_words(args)}, {count(args.threads, 'thread')}"
        tables = [
            Table(
                f"Forward to the logits: {setting}",
                "Less than 1 by turns: ours takes less time. Median (lowest to highest).",
                ["dtype", "batch", "model", "time", "ours / this, by turns", "largest difference of logits"],
                [row for dtype in DTYPES for batch in args.batches for row in forward_rows(reference, args, dtype, batch)],
            ),
            Table(
                f"run_with_cache, every activation: float32, batch 1, {setting}",
                "TransformerLens keeps nothing inside the experts and no head's output by itself. Median (lowest to highest).",
                ["model", "activations", "MB", "time", "ours / this, by turns", "ours without / this"],
                list(cache_rows(reference, args)),
            ),
        ]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    peers.add_model_options(result)
    result.add_argument("--context", type=int, default=512)
    result.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    return result


def random_tokens(args: argparse.Namespace, batch: int) -> Tensor:
    return torch.randint(0, args.vocabulary, (batch, args.context), generator=torch.Generator().manual_seed(0))


def forward_rows(reference: Any, args: argparse.Namespace, dtype: str, batch: int) -> Iterator[list[str]]:
    model, theirs = peers.ours(reference, DTYPES[dtype]), copy.deepcopy(reference).to(DTYPES[dtype])
    tokens = random_tokens(args, batch)
    candidates: dict[str, Callable[[], Tensor]] = {
        "hooked_moe": lambda: our_forward(model, tokens),
        "transformers, sdpa and grouped_mm": lambda: peers.forward(peers.with_kernels(theirs, peers.FAST), tokens),
        "transformers, eager": lambda: peers.forward(peers.with_kernels(theirs, peers.EAGER), tokens),
    }
    seconds = timed(candidates, args.repeats)
    logits = candidates["hooked_moe"]()
    for name, run in candidates.items():
        difference = float((run().float() - logits).abs().max())
        if dtype == "float32" and not difference <= TOLERANCE:
            raise ArithmeticError(f"logits differ from those of {name} by {difference:.1e}, more than {TOLERANCE:.0e}")
        own = name == "hooked_moe"
        compared = ["", ""] if own else [ratio(seconds["hooked_moe"], seconds[name]), f"{difference:.1e}"]
        yield [dtype, f"{batch}", name, summary(seconds[name]), *compared]


@torch.inference_mode()
def our_forward(model: HookedMoE, tokens: Tensor) -> Tensor:
    return model(tokens)


def cache_rows(reference: Any, args: argparse.Namespace) -> Iterator[list[str]]:
    model, tokens = peers.ours(reference), random_tokens(args, 1)
    alike = [name for name in model.hook_dict if not OURS_ALONE.search(name)]
    candidates: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "hooked_moe": lambda: cache_of(model, tokens),
        "hooked_moe, without those that TransformerLens has not": lambda: cache_of(model, tokens, alike),
    }
    if peers.installed("transformer-lens"):
        bridge = peers.bridge_of(reference)
        candidates["TransformerLens"] = lambda: cache_of(bridge, tokens)
    seconds = timed(candidates, args.repeats)
    for name, run in candidates.items():
        cache = run()
        compared = [ratio(seconds[own], seconds[name]) for own in candidates if own != name == "TransformerLens"]
        yield [name, f"{len(cache)}", f"{megabytes(cache):,.0f}", summary(seconds[name]), *(compared or ["", ""])]
    if "TransformerLens" not in candidates:
        yield ["TransformerLens", "", "", "not installed", "", ""]


@torch.inference_mode()
def cache_of(model: Any, tokens: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    return dict(model.run_with_cache(tokens, names_filter=names)[1])


def megabytes(cache: Mapping[str, Tensor]) -> float:
    """Of memory, that of activations which share it once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cache.values()}
    return sum(storages.values()) / 1e6


if __name__ == "__main__":
    main()
