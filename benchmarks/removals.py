"""How long the removal of one expert at one token takes: all of them at once, against one forward per removal.

    python -m benchmarks.removals                                     # context 512, 8 layers, 64 experts top-8, d_model 256
    python -m benchmarks.removals --contexts 256 512 1024 2048 --threads 1
    python -m benchmarks.removals --small                             # seconds; shows that it works, measures nothing

The peers run the same random weights in the same process, by turns: transformers' own OLMoE with its fastest attention (sdpa)
and experts (grouped_mm), with the routing weight zeroed inside its experts; TransformerLens's TransformerBridge around it, with
the weight zeroed at a hook point; nnsight around it, with an invoke for each removal. Each removes one expert a forward,
as the released code of arXiv 2606.10703 does, and several in the rows of a batch, at the batch size at which a removal takes it
the least time.

Some removals of every peer are compared with ours; the benchmark fails if one differs by more than 1e-5 nats.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import LossesWithout, Removals
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, seconds_of, summary, timed
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.results import ExpertEffects

TOLERANCE = 1e-5
"""Nats."""
HEADER = [
    "context",
    "removals by",
    "removals a forward",
    "time of one removal",
    "times ours, by turns",
    "largest difference, nats",
]


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, peers.SMALL | {"contexts": [32], "batches": [1, 2]})
    with threads(args.threads):
        table = Table(
            f"Removals: {peers.model_in_words(args)}, {count(args.threads, 'thread')}",
            "Every active expert at every token removed, one at a time: ours in one call for all, the others in a forward for "
            "each, or for as many as the best batch has rows. Median (lowest to highest).",
            HEADER,
            [row for context in args.contexts for row in rows(args, context)],
        )
    show([table])
    return [table]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    peers.add_model_options(result)
    result.add_argument("--contexts", type=int, nargs="+", default=[512])
    result.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes for the peers to choose from")
    result.add_argument("--batch-tokens", type=int, default=8192, help="largest number in a batch (default: %(default)s)")
    return result


def rows(args: argparse.Namespace, context: int) -> Iterator[list[str]]:
    reference = peers.random_olmoe(args, context)
    model = peers.ours(reference)
    tokens = torch.randint(0, args.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    effects = expert_effects(model, tokens)
    others, missing = the_others(reference)
    sizes = [size for size in args.batches if size * context <= args.batch_tokens] or [1]
    best = {name: best_batch(other, effects, tokens, sizes) for name, other in others.items()}
    candidates: dict[str, Callable[[], object]] = {"hooked_moe": lambda: expert_effects(model, tokens)} | {
        f"{name} {size}": run_of(others[name], tokens, removals_of(effects, size)) for name in others for size in {1, best[name]}
    }
    seconds = timed(candidates, args.repeats)
    removals = int(effects.delta_loss.isfinite().sum())
    each = [s / removals for s in seconds["hooked_moe"]]
    yield [f"{context:,}", "hooked_moe", f"{removals:,}", summary(each), "1", ""]
    for name, other in others.items():
        difference = largest_difference(other, effects, tokens, best[name])
        theirs = {size: [s / size for s in seconds[f"{name} {size}"]] for size in sorted({1, best[name]})}
        fastest = min(theirs, key=lambda size: median(theirs[size]))
        for size, one in theirs.items():
            in_words = f"{size} (best)" if size == fastest else f"{size}"
            yield [f"{context:,}", name, in_words, summary(one), ratio(one, each), f"{difference:.1e}"]
    for name, reason in missing.items():
        yield [f"{context:,}", name, "", reason, "", ""]


def the_others(reference: object) -> tuple[dict[str, LossesWithout], dict[str, str]]:
    """Those that can be compared, and why the rest cannot."""
    others, missing = {"transformers": peers.by_transformers(reference)}, {}
    if peers.installed("transformer-lens"):
        others["TransformerLens"] = peers.by_transformer_lens(peers.bridge_of(reference))
    else:
        missing["TransformerLens"] = "not installed"
    if peers.installed("nnsight"):
        others["nnsight"] = peers.by_nnsight(copy.deepcopy(reference))
    else:
        missing["nnsight"] = "not installed"
    return others, missing


def run_of(other: LossesWithout, tokens: Tensor, removals: Removals) -> Callable[[], Tensor]:
    return lambda: other(tokens, removals)


def best_batch(other: LossesWithout, effects: ExpertEffects, tokens: Tensor, sizes: Sequence[int]) -> int:
    """The batch size at which one removal takes the least time, by one run of each after a warm-up."""
    other(tokens, removals_of(effects, 1))
    return min(sizes, key=lambda size: seconds_of(run_of(other, tokens, removals_of(effects, size))) / size)


def removals_of(effects: ExpertEffects, size: int, seed: int = 0) -> Removals:
    """So many random removals in a random layer."""
    generator = torch.Generator().manual_seed(seed)
    n_layers, _, length, slots = effects.delta_loss.shape
    layer = int(torch.randint(n_layers, (1,), generator=generator))
    positions = torch.randint(length - 1, (size,), generator=generator)
    chosen = torch.randint(slots, (size,), generator=generator)
    return Removals(layer, positions, effects.expert_index[layer, 0, positions, chosen])


def largest_difference(other: LossesWithout, effects: ExpertEffects, tokens: Tensor, size: int, least: int = 8) -> float:
    """Between the losses after at least so many removals, in nats. Raises `ArithmeticError` if it is too large to be rounding."""
    worst = 0.0
    for seed in range(-(-least // size)):
        removals = removals_of(effects, size, seed)
        layer, at = removals.layer, removals.positions
        slot = (effects.expert_index[layer, 0, at] == removals.experts[:, None]).int().argmax(-1)
        expected = effects.baseline_loss[0, at] + effects.delta_loss[layer, 0, at, slot]
        worst = max(worst, float((other(tokens, removals) - expected).abs().max()))
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"removals differ by {worst:.1e} nats, more than {TOLERANCE:.0e}")
    return worst


if __name__ == "__main__":
    main()
