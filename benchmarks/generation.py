"""Generating tokens, one after another, against transformers.

    python -m benchmarks.generation                     # 64 tokens after a prompt of 64, batches of 1 and 8
    python -m benchmarks.generation --small             # seconds; shows that it works, measures nothing

The same random weights in the same process, by turns, greedy, with a key-value cache, and the same tokens at the end.
transformers runs with its fastest kernels (sdpa attention, grouped_mm experts), with its plainest (eager), and with each expert
in turn, which is its default on a CPU for models of few experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, peers.SMALL | {"prompt": 8, "new": 4, "batches": [1, 2]})
    with threads(args.threads):
        reference = peers.random_olmoe(args, args.prompt + args.new)
        table = Table(
            f"Generation: {args.new} tokens after {args.prompt}, greedy, float32, {peers.model_in_words(args)}, "
            f"{count(args.threads, 'thread')}",
            "Less than 1 by turns: ours takes less time. Median (lowest to highest).",
            ["batch", "model", "time", "time a token", "ours / this, by turns"],
            [row for batch in args.batches for row in rows(reference, args, batch)],
        )
    show([table])
    return [table]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    peers.add_model_options(result)
    result.add_argument("--prompt", type=int, default=64, help="tokens (default: %(default)s)")
    result.add_argument("--new", type=int, default=64, help="tokens to generate (default: %(default)s)")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    return result


def rows(reference: Any, args: argparse.Namespace, batch: int) -> Iterator[list[str]]:
    model = peers.ours(reference)
    prompts = torch.randint(0, args.vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
    candidates: dict[str, Callable[[], Tensor]] = {
        "hooked_moe": lambda: ours(model, prompts, args.new),
        "transformers, sdpa and grouped_mm": lambda: peers.generate(peers.with_kernels(reference, peers.FAST), prompts, args.new),
        "transformers, eager": lambda: peers.generate(peers.with_kernels(reference, peers.EAGER), prompts, args.new),
    }
    seconds = timed(candidates, args.repeats)
    expected = candidates["hooked_moe"]()
    for name, run in candidates.items():
        if not torch.equal(run(), expected):
            raise ArithmeticError(f"{name} generates other tokens than hooked_moe")
        compared = "" if name == "hooked_moe" else ratio(seconds["hooked_moe"], seconds[name])
        yield [f"{batch}", name, summary(seconds[name]), summary([s / args.new for s in seconds[name]]), compared]


def ours(model: HookedMoE, prompts: Tensor, new: int) -> Tensor:
    return cast(Tensor, model.generate(prompts, new, do_sample=False, stop_at_eos=False, verbose=False))


if __name__ == "__main__":
    main()
