"""How long patches of experts take: all of a prompt in one call, against one forward for each.

    python -m benchmarks.circuits                       # tiny-olmoe, a prompt of 12 tokens
    python -m benchmarks.circuits --tokens 12 48 --threads 1
    python -m benchmarks.circuits --small               # seconds; shows that it works, measures nothing

A patch puts an expert's contribution of the clean run into the corrupted run at one token, and reads a logit difference at the
end of the prompt. The peers make each in a forward of its own, from contributions that are given to them: a loop over our own
hooks; TransformerLens's `generic_activation_patch` over our model; and over transformers' OLMoE with the same weights a forward
hook, TransformerLens's TransformerBridge and nnsight. "In a batch" patches all of a sample in the rows of one forward.

Some patches of every peer are compared with ours; the benchmark fails if one differs by more than 1e-4 logits.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE
from hooked_moe.circuits import attribution_patch_experts, get_act_patch_expert
from hooked_moe.circuits.pairs import expert_deltas, prompt_pair
from hooked_moe.circuits.results import ExpertPatches
from hooked_moe.corpus import load_corpus
from hooked_moe.counterfactuals import At, LogitDifference

TOLERANCE = 1e-4
"""Logits."""
HEADER = ["tokens", "patches", "by", "time of one patch", "times ours, by turns", "largest difference, logits"]
ATTRIBUTION = ["tokens", "what", "time", "times two forwards and a backward, by turns"]


class Patch(NamedTuple):
    """One expert at one token, and what it adds to the residual stream."""

    layer: int
    pos: int
    delta: Tensor
    effect: float
    """By `get_act_patch_expert`."""


class Task(NamedTuple):
    """A pair of prompts, and what is read at the end."""

    model: HookedMoE
    clean: Tensor
    corrupt: Tensor
    first: int
    second: int

    @property
    def metric(self) -> At:
        return At(-1, LogitDifference(self.first, self.second))

    def read(self, logits: Tensor) -> Tensor:
        """The metric of every row."""
        return logits[:, -1, self.first] - logits[:, -1, self.second]


EffectOf = Callable[[Sequence[Patch]], Tensor]
"""The metric [patch] of the corrupted run with each patch."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, {"tokens": [6], "patches": 3, "repeats": 2})
    with threads(args.threads):
        tasks = [task(HookedMoE.from_pretrained(args.model).eval(), tokens) for tokens in args.tokens]
        setting = f"{args.model}, {count(args.threads, 'thread')}"
        patches = Table(
            f"Patches of experts: {setting}",
            "Every expert that either run goes to, in every layer, one at a time: ours in one call for all, the others in a "
            "forward for each, or for all of a sample in the rows of one. Median (lowest to highest).",
            HEADER,
            [row for each in tasks for where in ("the last token", "all tokens") for row in rows(args, each, where)],
        )
        attribution = Table(
            f"Attribution patching of experts: {setting}",
            "Estimates of all those patches. Median (lowest to highest).",
            ATTRIBUTION,
            [row for each in tasks for row in attribution_rows(args, each)],
        )
    show([patches, attribution])
    return [patches, attribution]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--model", default="tiny-olmoe", help="one of the OLMoE family (default: %(default)s)")
    result.add_argument("--tokens", type=int, nargs="+", default=[12], help="lengths of the prompt (default: 12)")
    result.add_argument("--patches", type=int, default=16, help="that each peer makes in a turn (default: %(default)s)")
    return result


def task(model: HookedMoE, tokens: int) -> Task:
    """A passage of the held-out corpus; the corrupted prompt has another token two thirds into it."""
    clean = model.to_tokens(load_corpus().documents[0].text[:4000])[:, 40 : 40 + tokens]
    corrupt = clean.clone()
    place = 2 * tokens // 3
    corrupt[0, place] = clean[0, place - 2]
    with torch.inference_mode():
        difference = model(clean)[0, -1] - model(corrupt)[0, -1]
    return Task(model, clean, corrupt, int(difference.argmax()), int(difference.argmin()))


def rows(args: argparse.Namespace, given: Task, where: str) -> Iterator[list[str]]:
    length = given.clean.shape[1]
    positions = None if where == "all tokens" else [length - 1]
    _, cache = given.model.run_with_cache(given.clean)

    def ours() -> ExpertPatches:
        return get_act_patch_expert(given.model, given.corrupt, cache, given.metric, positions=positions)

    found = ours()
    sample = patches_of(given, found, args.patches)
    others = the_others(given)
    differences = {name: largest_difference(given, other, sample) for name, other in others.items()}
    candidates: dict[str, Callable[[], object]] = {"hooked_moe": ours}
    candidates |= {name: partial(other, sample) for name, other in others.items()}
    seconds = timed(candidates, args.repeats)
    number = int(found.values.isfinite().sum())
    each = [s / number for s in seconds["hooked_moe"]]
    yield [f"{length}", f"{number:,}, {where}", "hooked_moe", summary(each), "1", ""]
    for name in others:
        theirs = [s / len(sample) for s in seconds[name]]
        yield [f"{length}", f"{len(sample)} of them", name, summary(theirs), ratio(theirs, each), f"{differences[name]:.1e}"]


def patches_of(given: Task, found: ExpertPatches, size: int) -> list[Patch]:
    """So many of the measured patches, drawn at random."""
    pair = prompt_pair(given.model, given.clean, given.corrupt)
    deltas = {layer: expert_deltas(pair, layer) for layer in found.layers}
    places = found.values.isfinite().nonzero()
    chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:size]]
    return [
        Patch(found.layers[i], pos, deltas[found.layers[i]].delta[batch, pos, slot], float(found.values[i, batch, pos, slot]))
        for i, batch, pos, slot in chosen.tolist()
    ]


def largest_difference(given: Task, other: EffectOf, sample: Sequence[Patch]) -> float:
    """Between the effects, in logits. Raises `ArithmeticError` if it is too large to be rounding."""
    with torch.inference_mode():
        baseline = given.read(given.model(given.corrupt))
    worst = float((other(sample) - baseline - torch.tensor([patch.effect for patch in sample])).abs().max())
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"patches differ by {worst:.1e} logits, more than {TOLERANCE:.0e}")
    return worst


# --- the others --------------------------------------------------------------------------------------------------------------


def the_others(given: Task) -> dict[str, EffectOf]:
    """Those that are installed."""
    reference = in_transformers(given.model)
    others = {"hooked_moe, a hook": by_hooks(given), "hooked_moe, hooks in a batch": by_variants(given)}
    others["transformers, a forward hook"] = by_transformers(given, reference)
    if peers.installed("transformer-lens"):
        others["TransformerLens's patching, our model"] = by_patching(given)
        others["TransformerLens's bridge"] = by_bridge(given, peers.bridge_of(reference))
    if peers.installed("nnsight"):
        others["nnsight"] = by_nnsight(given, copy.deepcopy(reference))
    return others


def in_transformers(model: HookedMoE) -> Any:
    """The same weights in transformers' own OLMoE, with its fastest kernels."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return peers.with_kernels(reference, peers.FAST)


def adding(patch: Patch) -> Callable[..., Tensor]:
    """A hook that adds the patch at its token."""

    def add(x: Tensor, hook: Any = None) -> Tensor:
        x = x.clone()
        x[:, patch.pos] += patch.delta
        return x

    return add


def by_hooks(given: Task) -> EffectOf:
    @torch.inference_mode()
    def run(sample: Sequence[Patch]) -> Tensor:
        hooks = [[(f"blocks.{patch.layer}.mlp.hook_routed_out", adding(patch))] for patch in sample]
        return torch.cat([given.read(given.model.run_with_hooks(given.corrupt, fwd_hooks=hook)) for hook in hooks])

    return run


def by_variants(given: Task) -> EffectOf:
    def run(sample: Sequence[Patch]) -> Tensor:
        edits = [(f"blocks.{patch.layer}.mlp.hook_routed_out", adding(patch)) for patch in sample]
        return given.read(given.model.run_variants(given.corrupt, edits)[:, 0])

    return run


def by_patching(given: Task) -> EffectOf:
    """TransformerLens's loop, with an index of its own and a setter for the block's output."""

    @torch.inference_mode()
    def run(sample: Sequence[Patch]) -> Tensor:
        import pandas

        patching: Any = import_module("transformer_lens.patching")

        def setter(x: Tensor, index: Any, clean: Tensor) -> Tensor:
            return adding(sample[index[1]])(x)

        index = pandas.DataFrame({"layer": [patch.layer for patch in sample], "patch": range(len(sample))})
        cache = {f"blocks.{layer}.hook_mlp_out": None for layer in range(given.model.cfg.n_layers)}
        patching.tqdm = lambda steps, *args, **options: steps
        return patching.generic_activation_patch(
            given.model, given.corrupt, cache, lambda logits: given.read(logits)[0], setter, "mlp_out", index_df=index
        )

    return run


def by_bridge(given: Task, bridge: Any) -> EffectOf:
    @torch.inference_mode()
    def run(sample: Sequence[Patch]) -> Tensor:
        hooks = [[(f"blocks.{patch.layer}.hook_mlp_out", adding(patch))] for patch in sample]
        return torch.cat([given.read(bridge.run_with_hooks(given.corrupt, fwd_hooks=hook)) for hook in hooks])

    return run


def by_transformers(given: Task, reference: Any) -> EffectOf:
    def one(patch: Patch) -> Tensor:
        mlp, add = reference.model.layers[patch.layer].mlp, adding(patch)
        handle = mlp.register_forward_hook(lambda module, inputs, output: add(output))
        try:
            return given.read(peers.forward(reference, given.corrupt))
        finally:
            handle.remove()

    return lambda sample: torch.cat([one(patch) for patch in sample])


def by_nnsight(given: Task, reference: Any) -> EffectOf:
    from nnsight import NNsight, save

    model = NNsight(reference)

    @torch.inference_mode()
    def one(patch: Patch) -> Tensor:
        with model.trace(given.corrupt, use_cache=False):
            model.model.layers[patch.layer].mlp.output[:, patch.pos] += patch.delta
            logits: Any = save(model.output.logits)
        return given.read(logits)

    return lambda sample: torch.cat([one(patch) for patch in sample])


# --- attribution -------------------------------------------------------------------------------------------------------------


def attribution_rows(args: argparse.Namespace, given: Task) -> Iterator[list[str]]:
    length = given.clean.shape[1]

    def two_forwards_and_a_backward() -> None:
        with torch.no_grad():
            given.model(given.clean)
        given.read(given.model(given.corrupt)).sum().backward()
        given.model.zero_grad()

    def estimate(method: Any) -> Callable[[], object]:
        return lambda: attribution_patch_experts(given.model, given.clean, given.corrupt, given.metric, method)

    seconds = timed(
        {
            "two forwards and a backward": two_forwards_and_a_backward,
            "atp": estimate("atp"),
            "ig, 5 steps": estimate("ig"),
            "exact": lambda: get_act_patch_expert(given.model, given.corrupt, given.clean, given.metric),
        },
        args.repeats,
    )
    for name, theirs in seconds.items():
        yield [f"{length}", name, summary(theirs), ratio(theirs, seconds["two forwards and a backward"])]


if __name__ == "__main__":
    main()
