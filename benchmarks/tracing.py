"""How long causal tracing takes: all patches of a batch of prompts in one call, against a forward for each.

    python -m benchmarks.tracing                            # tiny-olmoe-facts, prompts of 8 to 32 tokens
    python -m benchmarks.tracing --tokens 12 --rows 32 --threads 1
    python -m benchmarks.tracing --small                    # seconds; shows that it works, measures nothing

Every layer, and in it every site and every expert with its parts and controls, is patched at the last token, at one token two
thirds into the prompt, or at all tokens from there on; what is read is always the last. Ours is all of `measure` but removals:
the clean and the corrupted run, their difference, the ceilings and the gradients are in its time. The peer is given the patches:
in each of its forwards all prompts have one of their own added by a hook, and only their last tokens are unembedded.

A sample of the peer's patches is compared with ours; the benchmark fails if one differs by more than 1e-4 logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE
from hooked_moe.circuits.tracing.batches import Batch, Spots
from hooked_moe.circuits.tracing.measure import Measured, measure
from hooked_moe.circuits.tracing.readings import answer_direction
from hooked_moe.corpus import load_corpus

TOLERANCE = 1e-4
"""Logits."""
HEADER = ["tokens", "patched", "patches", "time of one", "a forward each", "times ours, by turns", "largest difference, logits"]
PATCHED = {"the last token": lambda length: [length - 1], "one before": lambda length: [2 * length // 3]}
PATCHED |= {"all from there on": lambda length: list(range(2 * length // 3, length))}


class Patch(NamedTuple):
    """The same variant of a layer in several rows, each at one token."""

    layer: int
    variant: int
    spots: Tensor
    delta: Tensor
    """[row, d_model], of the rows of the spots."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, {"tokens": [6], "rows": 3, "patches": 3, "repeats": 2})
    with threads(args.threads):
        model = HookedMoE.from_pretrained(args.model).eval()
        table = Table(
            f"Causal tracing: {args.model}, {count(args.rows, 'prompt')}, {count(args.threads, 'thread')}",
            "Every patch of every layer: ours in one call for all, the peer in a forward for each, of all prompts together. "
            "Median (lowest to highest).",
            HEADER,
            [row_of(args, model, length, where) for length in args.tokens for where in PATCHED],
        )
    show([table])
    return [table]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--model", default="tiny-olmoe-facts", help="(default: %(default)s)")
    result.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32], help="lengths of the prompts (default: 8 16 32)")
    result.add_argument("--rows", type=int, default=8, help="prompts that are traced together (default: %(default)s)")
    result.add_argument("--patches", type=int, default=8, help="forwards of the peer in a turn (default: %(default)s)")
    return result


def row_of(args: argparse.Namespace, model: HookedMoE, length: int, where: str) -> list[str]:
    batch = batch_of(model, args.rows, length, PATCHED[where](length))
    found = measure(model, batch, ["logit_difference"], necessity=False)
    sample = patches_of(model, found, args.patches)
    difference = largest_difference(model, found, sample)
    seconds = timed(
        {
            "ours": lambda: measure(model, batch, ["logit_difference"], necessity=False),
            "a forward each": lambda: [patched(model, batch, patch) for patch in sample],
        },
        args.repeats,
    )
    number = sum(int(deltas.any(-1).sum()) for deltas in variants(model, found))
    ours = [s / number for s in seconds["ours"]]
    theirs = [s / sum(len(patch.spots) for patch in sample) for s in seconds["a forward each"]]
    return [f"{length}", where, f"{number:,}", summary(ours), summary(theirs), ratio(theirs, ours), f"{difference:.1e}"]


def batch_of(model: HookedMoE, rows: int, length: int, positions: Sequence[int]) -> Batch:
    """Passages of the held-out corpus; the corrupted prompts have another token two thirds into them."""
    text = model.to_tokens(load_corpus().documents[0].text[: 40 * rows * length])[0]
    clean = text[: rows * length].view(rows, length)
    corrupted = clean.clone()
    corrupted[:, 2 * length // 3] = clean[:, 0].roll(1)
    pos = torch.tensor(positions).repeat(rows)
    row = torch.arange(rows).repeat_interleave(len(positions))
    answers = clean[:, -2], clean[:, 1]
    spots = Spots(row, pos, ["final"] * len(row), range(len(row)))
    return Batch(
        [], clean, corrupted, None, torch.ones_like(clean, dtype=torch.bool), torch.full((rows,), length - 1), *answers, spots
    )


def variants(model: HookedMoE, found: Measured) -> Iterator[Tensor]:
    """What is added in each layer, [variant, spot, d_model]."""
    return (layer.variants(model.cfg.experts_per_token) for layer in found.patches)


def patches_of(model: HookedMoE, found: Measured, size: int) -> list[Patch]:
    """A sample over layers, variants and positions, each in all rows."""
    deltas = list(variants(model, found))
    positions = found.batch.spots.pos.unique().tolist()
    patches = []
    for number in range(size):
        layer = number * len(deltas) // size
        variant = number * 7 % len(deltas[layer])
        spots = (found.batch.spots.pos == positions[number % len(positions)]).nonzero()[:, 0]
        patches.append(Patch(layer, variant, spots, deltas[layer][variant, spots]))
    return patches


@torch.inference_mode()
def patched(model: HookedMoE, batch: Batch, patch: Patch) -> Tensor:
    """The logit differences at the last tokens of one forward with a hook."""
    rows, positions = batch.spots.row[patch.spots], batch.spots.pos[patch.spots]

    def add(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[rows, positions] += patch.delta
        return x

    with model.hooks([(f"blocks.{patch.layer}.hook_resid_post", add)]):
        resid = model(batch.corrupted, stop_at_layer=model.cfg.n_layers)[rows, batch.final[rows]]
    return (model.ln_final(resid) * answer_direction(model, batch.true[rows], batch.foil[rows])).sum(-1)


def largest_difference(model: HookedMoE, found: Measured, sample: Sequence[Patch]) -> float:
    """Raises `ArithmeticError` if a patch is not what a forward with a hook makes of it."""
    worst = 0.0
    for patch in sample:
        ours = found.rescue[patch.layer, patch.variant, patch.spots, 0]
        unpatched = patched(model, found.batch, patch._replace(delta=torch.zeros_like(patch.delta)))
        worst = max(worst, float((ours - (patched(model, found.batch, patch) - unpatched)).abs().max()))
    if worst > TOLERANCE:
        raise ArithmeticError(
            f"patches differ by {worst:.1e} logits from those of a forward each; up to {TOLERANCE:g} is rounding"
        )
    return worst


if __name__ == "__main__":
    main()
