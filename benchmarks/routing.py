"""Routing tables of the shipped corpus, against loops with hooks.

    python -m benchmarks.routing                        # tiny-olmoe on all 72 documents: a few minutes on two quiet cores
    python -m benchmarks.routing --model tiny-deepseek-moe --threads 1
    python -m benchmarks.routing --small                # seconds; shows that it works, measures nothing

Both loops run a forward pass per window of the same model, with hooks that keep what the routers say. One makes arrays of each
window's routing, the other a row per token, layer and expert, as short scripts do. All have to find the same experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE, load_corpus
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.routing import (
    RoutingTable,
    coactivation,
    domain_specialisation,
    routing_table,
    standing_committee,
    transition,
    vocabulary_specialisation,
)

SMALL = {"documents": 1, "tokens": 64, "repeats": 1}
OURS, ARRAYS, ROWS = "hooked_moe", "hooks, arrays", "hooks, rows"
LEAST_AGREEMENT = 0.999
"""Batches round differently, and now and then that swaps two experts that are nearly tied."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--model", default="tiny-olmoe", help="one that ships (default: %(default)s)")
    options.add_argument("--documents", type=int, default=72, help="of the shipped corpus (default: all, %(default)s)")
    options.add_argument("--tokens", type=int, help="of each document at most (default: all)")
    args = parse(options, argv, SMALL)
    model = HookedMoE.from_pretrained(args.model)
    corpus = load_corpus("held-out")
    corpus = dataclasses.replace(corpus, documents=corpus.documents[: args.documents])
    tokenized = TokenizedCorpus(model, corpus, model.cfg.n_ctx, args.tokens)
    with threads(args.threads), torch.no_grad():
        tables = [compare(model, tokenized, args), analyses(routing_table(model, tokenized), args)]
    show(tables)
    return tables


def compare(model: HookedMoE, corpus: TokenizedCorpus, args: Any) -> Table:
    found: dict[str, np.ndarray] = {}

    def keeping(name: str, run: Callable[[HookedMoE, TokenizedCorpus], np.ndarray]) -> Callable[[], None]:
        return lambda: found.update({name: run(model, corpus)})

    seconds = timed({name: keeping(name, run) for name, run in CANDIDATES.items()}, args.repeats)
    rows = []
    for name in CANDIDATES:
        agreement = float((found[name] == found[OURS]).mean())
        if agreement < LEAST_AGREEMENT:
            raise ValueError(f"{name} finds the same expert in {agreement:.4f} of the rows only")
        rows.append([name, summary(seconds[name]), ratio(seconds[name], seconds[OURS]), f"{agreement:.6f}"])
    lengths = corpus.lengths()
    title = f"Routing table of {model.cfg.model_name}: {sum(lengths):,} tokens, {len(found[OURS]):,} rows"
    meaning = f"{count(args.threads, 'thread')}. Time against hooked_moe's; in how many rows the expert is the same."
    return Table(title, meaning, ["by", "time", "ratio", "same expert"], rows)


def ours(model: HookedMoE, corpus: TokenizedCorpus) -> np.ndarray:
    return routing_table(model, corpus).table()["expert"].to_numpy()


def observed(model: HookedMoE, corpus: TokenizedCorpus) -> Any:
    """Of every window: its own tokens, and the router logits and experts of all layers."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    points = ("router_logits", "expert_indices", "expert_weights")
    names = [f"blocks.{layer}.mlp.hook_{point}" for layer in model.cfg.moe_layers for point in points]
    for windows in corpus.documents:
        for window in windows:
            model.run_with_hooks(torch.from_numpy(window.tokens)[None], fwd_hooks=[(name, keep) for name in names])
            by_layer = [[kept[f"blocks.{layer}.mlp.hook_{point}"][0] for point in points] for layer in model.cfg.moe_layers]
            yield window, slice(corpus.first, len(window.tokens) - (window is not windows[-1])), by_layer


def with_arrays(model: HookedMoE, corpus: TokenizedCorpus) -> np.ndarray:
    """The columns of each window as arrays, joined at the end."""
    parts = []
    for _, own, by_layer in observed(model, corpus):
        columns = []
        for logits, experts, weights in by_layer:
            p = logits.softmax(-1)
            entropy = -(p * p.log()).sum(-1, keepdim=True).expand(experts.shape)
            line = logits.topk(experts.shape[-1] + 1, dim=-1).values
            columns.append([x[own] for x in (experts, weights, p.gather(-1, experts), entropy, line[..., :-1] - line[..., -1:])])
        parts.append([torch.stack(column, dim=1).numpy() for column in zip(*columns, strict=True)])
    experts, *_ = (np.concatenate(column) for column in zip(*parts, strict=True))
    return experts.ravel()


def with_rows(model: HookedMoE, corpus: TokenizedCorpus) -> np.ndarray:
    """A dict for every token, layer and expert."""
    rows: list[dict[str, Any]] = []
    for window, own, by_layer in observed(model, corpus):
        lists = [(logits.softmax(-1).tolist(), experts.tolist(), weights.tolist()) for logits, experts, weights in by_layer]
        for position in range(own.start, own.stop):
            for layer, (p, experts, weights) in zip(model.cfg.moe_layers, lists, strict=True):
                for slot, (expert, weight) in enumerate(zip(experts[position], weights[position], strict=True)):
                    rows.append(
                        {
                            "document": window.document,
                            "position": window.start + position - own.start,
                            "layer": layer,
                            "slot": slot,
                            "expert": expert,
                            "weight": weight,
                            "probability": p[position][expert],
                        }
                    )
    return np.array([row["expert"] for row in rows])


CANDIDATES = {OURS: ours, ARRAYS: with_arrays, ROWS: with_rows}


def analyses(table: RoutingTable, args: Any) -> Table:
    functions: dict[str, Callable[[RoutingTable], object]] = {
        "coactivation": coactivation,
        "transition": transition,
        "domain_specialisation": domain_specialisation,
        "vocabulary_specialisation": vocabulary_specialisation,
        "standing_committee": standing_committee,
    }
    seconds = timed({name: partial(function, table) for name, function in functions.items()}, args.repeats)
    rows = [[name, summary(own)] for name, own in seconds.items()]
    meaning = "All layers; intervals from 1,000 resamples of documents (co-activation, transition) or 2,000 (domains)."
    return Table("What the table says", meaning, ["function", "time"], rows)


if __name__ == "__main__":
    main()
