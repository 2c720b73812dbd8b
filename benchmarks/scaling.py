"""How the time of the exhaustive `expert_effects` grows with context, layers, experts and documents.

    python -m benchmarks.scaling                    # context 128 to 2048, 2 to 16 layers, 16 to 128 experts, 1 to 8 documents
    python -m benchmarks.scaling --threads 1 --repeats 7
    python -m benchmarks.scaling --small            # seconds; shows that it works, measures nothing

One quantity varies, the others stay at those of the base. The exponent a of time ~ x^a is the slope of a least-squares line
through the logarithms of the medians, with its standard error; beside it, that of the work, as `removal_work` counts it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from scipy.stats import linregress

from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import summary, timed
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.work import removal_work


@dataclass(frozen=True)
class Size:
    context: int = 256
    """Tokens of each document."""
    layers: int = 4
    experts: int = 64
    documents: int = 1
    """One after another."""
    active: int = 8
    """Experts of a token."""
    d_model: int = 256


SMALL = {"contexts": [16, 32, 64], "layers": [1, 2, 3], "experts": [8, 16, 32], "documents": [1, 2, 3], "repeats": 1}
SMALL_BASE = Size(context=16, layers=2, experts=8, active=2, d_model=32)


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    base = SMALL_BASE if args.small else Size()
    axes = {"context": args.contexts, "layers": args.layers, "experts": args.experts, "documents": args.documents}
    with threads(args.threads):
        measured = {axis: measure(base, axis, values, args.repeats) for axis, values in axes.items()}
    setting = (
        f"base: context {base.context}, {base.layers} layers, {base.experts} experts top-{base.active}, d_model {base.d_model}, "
        f"{count(base.documents, 'document')}; {count(args.threads, 'thread')}"
    )
    tables = [exponents(measured, setting), points(measured)]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    result.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    result.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    result.add_argument("--documents", type=int, nargs="+", default=[1, 2, 4, 8])
    return result


def measure(base: Size, axis: str, values: Sequence[int], repeats: int) -> dict[Size, list[float]]:
    """Seconds of every repeat, for the base with other values of one quantity."""
    sizes = {str(value): replace(base, **{axis: value}) for value in values}
    seconds = timed({value: effects_of(size) for value, size in sizes.items()}, repeats)
    return {size: seconds[value] for value, size in sizes.items()}


def effects_of(size: Size) -> Callable[[], None]:
    """Measures every removal in random documents, with a random model."""
    torch.manual_seed(0)
    model = HookedMoE(config(size)).eval()
    documents = torch.randint(0, model.cfg.d_vocab, (size.documents, 1, size.context))

    def run() -> None:
        for tokens in documents:
            expert_effects(model, tokens)

    return run


def config(size: Size) -> HookedMoEConfig:
    return HookedMoEConfig(
        n_layers=size.layers,
        d_model=size.d_model,
        d_vocab=4 * size.d_model,
        n_ctx=size.context,
        n_heads=size.d_model // 32,
        n_key_value_heads=size.d_model // 32,
        d_head=32,
        qk_norm="full",
        num_experts=size.experts,
        experts_per_token=size.active,
        d_expert=size.d_model // 2,
        initializer_range=0.08,
    )


def exponents(measured: Mapping[str, Mapping[Size, list[float]]], setting: str) -> Table:
    rows = []
    for axis, by_size in measured.items():
        values = [getattr(size, axis) for size in by_size]
        slope, error = exponent(values, [median(seconds) for seconds in by_size.values()])
        of_work, _ = exponent(values, [work(size) for size in by_size])
        rows.append([axis, f"{min(values):,} to {max(values):,}", f"{slope:.2f} ± {error:.2f}", f"{of_work:.2f}"])
    return Table(
        f"Scaling of all removals: {setting}",
        "The exponent a in time ~ (quantity)^a, with its standard error, and in work ~ (quantity)^a, counted.",
        ["quantity", "from", "exponent of the time", "of the work"],
        rows,
    )


def exponent(values: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """Slope in log-log by least squares, and its standard error, from the residuals."""
    line = linregress(np.log(values), np.log(y))
    return float(line.slope), float(line.stderr)


def work(size: Size) -> float:
    """Floating-point operations in matrix products."""
    return size.documents * sum(removal_work(config(size), size.context, range(size.layers)).values())


def points(measured: Mapping[str, Mapping[Size, list[float]]]) -> Table:
    rows = [
        [axis, f"{getattr(size, axis):,}", summary(seconds), f"{work(size) / median(seconds) / 1e9:,.3g}"]
        for axis, by_size in measured.items()
        for size, seconds in by_size.items()
    ]
    return Table(
        "Times behind the exponents",
        "Median (lowest to highest); what is not named is as in the base.",
        ["quantity", "", "time", "GFLOP/s"],
        rows,
    )


if __name__ == "__main__":
    main()
