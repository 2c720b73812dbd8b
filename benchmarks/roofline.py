"""What share of the machine's matrix-product rate the exhaustive `expert_effects` achieves, in total and by phase.

    python -m benchmarks.roofline                       # d_model 1024, 4 layers of 64 experts top-8, context 512
    python -m benchmarks.roofline --dtypes bfloat16 --layers 8 --threads 1
    python -m benchmarks.roofline --small               # seconds; shows that it works, measures nothing

The machine's rate is what torch.mm keeps up for a second, at the square size that it likes best, before and after each
measurement: a single product of some milliseconds, which is given too, is often faster than a machine can go on for. The work is
counted exactly (`removal_work`). Phases are timed in a run of their own, for the clocks take time too.

Weights are random, and embeddings large beside what the blocks add, so that tokens go to all experts alike, as in trained models.

Target: at least 40% of the bfloat16 rate, end to end.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

import hooked_moe.components.moe
import hooked_moe.counterfactuals.engine.fan_out
import hooked_moe.counterfactuals.engine.losses
import hooked_moe.counterfactuals.expert_removal
import hooked_moe.kernels.cpu.expert_mlp
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import seconds_of, summary, timed
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.cli.device_rates import products_per_second
from hooked_moe.components.attention import Attention
from hooked_moe.components.experts import ExpertGroups, Experts
from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.grouped_query_attention import GroupedQueryAttention
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import HookedRMSNorm, RMSNorm
from hooked_moe.components.rotary import Rotation
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.work import ATTENTION, EXPERTS, PROJECTIONS, ROUTING, UNEMBEDDING, removal_work

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL: dict[str, float] = {"d_model": 64, "layers": 2, "experts": 8, "active": 2, "d_expert": 32, "vocabulary": 256}
SMALL |= {"context": 32, "repeats": 1, "seconds": 0.01}
TARGET = 0.4

COMBINE, ACTIVATION, NORMS, OBSERVE, REST = (
    "combine",
    "expert activation",
    "norms and rotations",
    "observation",
    "everything else",
)
PHASES = (PROJECTIONS, ATTENTION, ROUTING, EXPERTS, ACTIVATION, COMBINE, NORMS, OBSERVE, UNEMBEDDING, REST)

WRAPPED: tuple[tuple[Any, str, str], ...] = (
    (GroupedQueryAttention, "project", PROJECTIONS),
    (Attention, "output", PROJECTIONS),
    (Attention, "attend", ATTENTION),
    (hooked_moe.counterfactuals.engine.fan_out, "window_attention", ATTENTION),
    (MoE, "route", ROUTING),
    (ExpertGroups, "__init__", ROUTING),
    (Experts, "forward", EXPERTS),
    (GatedMLP, "forward", EXPERTS),
    (MoE, "run_experts", ROUTING),
    (hooked_moe.kernels.cpu.expert_mlp, "swiglu", ACTIVATION),
    (hooked_moe.components.moe, "masked_combine", COMBINE),
    (RMSNorm, "forward", NORMS),
    (HookedRMSNorm, "forward", NORMS),
    (Rotation, "__call__", NORMS),
    (hooked_moe.counterfactuals.expert_removal, "observe", OBSERVE),
    (hooked_moe.counterfactuals.engine.losses, "target_loss", UNEMBEDDING),
    (hooked_moe.counterfactuals.engine.fan_out, "prediction_change", UNEMBEDDING),
)
"""Which function is which phase. Time inside a wrapped function counts for the innermost one."""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    with threads(args.threads):
        measured = [measure(config(args, DTYPES[dtype]), args) for dtype in args.dtypes]
    tables = [totals(measured, args), by_phase(measured)]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add_sizes(result)
    result.add_argument("--seconds", type=float, default=1.0, help="that torch.mm is timed for (default: %(default)s)")
    return result


def add_sizes(options: argparse.ArgumentParser) -> None:
    """Of a model with random weights, and of its text."""
    options.add_argument("--d-model", type=int, default=1024, help="in heads of 64 (default: %(default)s)")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--active", type=int, default=8)
    options.add_argument("--d-expert", type=int, default=512)
    options.add_argument("--vocabulary", type=int, default=8192)
    options.add_argument("--context", type=int, default=512)


def config(args: argparse.Namespace, dtype: torch.dtype) -> HookedMoEConfig:
    heads = args.d_model // 64
    return HookedMoEConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        d_vocab=args.vocabulary,
        n_ctx=args.context,
        n_heads=heads,
        n_key_value_heads=heads,
        d_head=64,
        qk_norm="full",
        num_experts=args.experts,
        experts_per_token=args.active,
        d_expert=args.d_expert,
        dtype=dtype,
    )


@dataclass(frozen=True)
class Measured:
    """Rates are in floating-point operations per second."""

    cfg: HookedMoEConfig
    work: dict[str, float]
    """Floating-point operations in the matrix products of each phase."""
    seconds: list[float]
    """Of each repeat."""
    sustained: list[float]
    """The machine's rate around each repeat, in the model's dtype."""
    best: float
    """Of the fastest single product."""
    by_phase: dict[str, float]
    """Seconds, in the middle one of as many runs under clocks."""
    rates: dict[torch.dtype, float]
    """The machine's, about the time of the phases."""

    @property
    def achieved(self) -> list[float]:
        return [sum(self.work.values()) / seconds for seconds in self.seconds]

    @property
    def shares(self) -> list[float]:
        return [ours / machine for ours, machine in zip(self.achieved, self.sustained, strict=True)]


def random_model(cfg: HookedMoEConfig) -> HookedMoE:
    torch.manual_seed(0)
    model = HookedMoE(cfg).eval()
    torch.nn.init.normal_(model.embed.W_E)
    return model


def measure(cfg: HookedMoEConfig, args: argparse.Namespace) -> Measured:
    model = random_model(cfg)
    tokens = torch.randint(0, cfg.d_vocab, (1, args.context))

    def effects() -> None:
        expert_effects(model, tokens)

    machine = {dtype: Products(dtype, (64, 128) if args.small else (1024, 2048, 4096)) for dtype in {torch.float32, cfg.dtype}}
    effects()  # warm up
    seconds, around = [], [machine[cfg.dtype].sustained(args.seconds)]
    for _ in range(args.repeats):
        seconds.append(seconds_of(effects))
        around.append(machine[cfg.dtype].sustained(args.seconds))
    runs = sorted((under_clocks(effects) for _ in range(args.repeats)), key=lambda spent: sum(spent.values()))
    return Measured(
        cfg,
        removal_work(cfg, args.context, range(cfg.n_layers)),
        seconds,
        [mean(two) for two in pairwise(around)],
        machine[cfg.dtype].best,
        runs[len(runs) // 2],
        {dtype: products.sustained(args.seconds) for dtype, products in machine.items()},
    )


class Products:
    """Square matrix products, the second factor in the orientation of weights: [out, in]."""

    def __init__(self, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        matrices = {size: (torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)) for size in sizes}
        single = timed({str(size): partial(torch.mm, a, b.T) for size, (a, b) in matrices.items()}, repeats=5)
        rates = {size: 2 * size**3 / min(single[str(size)]) for size in sizes}
        self.size = max(rates, key=rates.__getitem__)
        self.factors = matrices[self.size]
        self.best = rates[self.size]
        """Operations per second of the fastest one."""

    def sustained(self, seconds: float) -> float:
        """Operations per second while they go on for so long."""
        return 2 * self.size**3 * products_per_second(*self.factors, seconds)


def under_clocks(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of every phase of a run."""
    with clocked(WRAPPED) as spent:
        whole = seconds_of(run)
    return spent | {REST: whole - sum(spent.values())}


def totals(measured: Sequence[Measured], args: argparse.Namespace) -> Table:
    cfg = measured[0].cfg
    rows = [
        [
            name_of(one.cfg.dtype),
            summary(one.seconds),
            f"{median(one.achieved) / 1e9:,.3g}",
            f"{median(one.sustained) / 1e9:,.0f}",
            f"{median(one.shares):.1%} ({min(one.shares):.1%} to {max(one.shares):.1%})",
            f"{one.best / 1e9:,.0f}",
            f"{median(one.achieved) / one.best:.1%}",
        ]
        for one in measured
    ]
    return Table(
        f"Share of the machine's rate: context {args.context}, {cfg.n_layers} layers, {cfg.num_experts} experts "
        f"top-{cfg.experts_per_token}, d_model {cfg.d_model}, d_expert {cfg.d_expert}, vocabulary {cfg.d_vocab:,}, "
        f"{count(args.threads, 'thread')}",
        f"All removals of a text do {sum(measured[0].work.values()) / 1e9:,.3g} GFLOP of matrix products. Target: "
        f"{TARGET:.0%} of the bfloat16 rate that torch.mm keeps up for {args.seconds:.3g} s, measured before and after each run.",
        ["model in", "time", "GFLOP/s", "torch.mm, GFLOP/s", "share, by turns", "its fastest single product", "share of that"],
        rows,
    )


def by_phase(measured: Sequence[Measured]) -> Table:
    header = ["phase", "products, GFLOP"]
    for one in measured:
        dtype = name_of(one.cfg.dtype)
        header += [f"{dtype}: time, s", "of the time", "of the machine's rate"]
    return Table(
        "Where the time goes",
        "The middle one of several runs with a clock around every function of a phase; the rate is that of the products' dtype.",
        header,
        [phase_row(phase, measured) for phase in PHASES],
    )


def phase_row(phase: str, measured: Sequence[Measured]) -> list[str]:
    work = measured[0].work.get(phase)
    row = [phase, f"{work / 1e9:,.3g}" if work else ""]
    for one in measured:
        seconds = one.by_phase.get(phase, 0.0)
        rate = one.rates[dtype_of(phase, one.cfg)]
        share = f"{work / seconds / rate:.1%}" if work and seconds else ""
        row += [f"{seconds:.3f}", f"{seconds / sum(one.by_phase.values()):.1%}", share]
    return row


def dtype_of(phase: str, cfg: HookedMoEConfig) -> torch.dtype:
    """Of the phase's products: the router is in float32 whatever the model is in, the clean run's unembedding too."""
    return torch.float32 if phase == ROUTING else cfg.dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def clocked(wrapped: Sequence[tuple[Any, str, str]]) -> Iterator[dict[str, float]]:
    """Seconds spent in each phase while the context lasts, in the thread that measures."""
    spent: dict[str, float] = defaultdict(float)
    inner = [0.0]  # seconds in wrapped functions called by each wrapped function that is running

    def clock(fn: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            started = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                spent[phase] += taken - inner.pop()
                inner[-1] += taken

        return run

    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    try:
        for (owner, name, phase), (_, _, original) in zip(wrapped, originals, strict=True):
            setattr(owner, name, clock(original, phase))
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
