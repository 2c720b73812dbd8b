"""Say what an audit of a model takes, before anything is downloaded: operations, memory, disk and time.

    hooked-moe plan --model olmoe --device h100 --products bfloat16
    hooked-moe plan --model deepseek-v3 --device h200 --dtype bfloat16 --tokens 128 --layers 3,30,60
    hooked-moe plan --model qwen3-30b-a3b --store bfloat16 --budget 1%   # on this machine, whose products are timed for a second
    hooked-moe plan --model ~/models/olmoe --tflops 100                  # at a rate of your own, as products keep it up

The work is counted from the model's config.json: those of published models come with the package, and a directory needs no
weights. --dtype, --store, --products, --layers, --tokens and --budget are those of the audit. A device by name is taken to
reach 30% of the peak that its maker publishes, an assumption that --utilisation replaces; of a rate that was measured or given,
50%. The time is that of matrix products: reading weights, writing tables and the analysis come on top, and are most of it for the
small models that ship. Memory is what is taken at most, without --memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import get_args

import torch

from hooked_moe.checks import unknown_name
from hooked_moe.cli.audit_plan import Plan, Text, affordable, plan_of
from hooked_moe.cli.console import parser_of, run_command, whole_number
from hooked_moe.cli.device_rates import (
    DEVICES,
    PEAK_UTILISATION,
    SUSTAINED_UTILISATION,
    memory_of,
    sustained_rate,
)
from hooked_moe.cli.options import DTYPES, choose_device, parse_budget, parse_layers
from hooked_moe.config import HookedMoEConfig
from hooked_moe.counterfactuals.work import parameters
from hooked_moe.loading.pretrained import read_config
from hooked_moe.loading.published import published_config, published_names
from hooked_moe.loading.registry import locate
from hooked_moe.measurement.part_spec import ProductsName

HERE = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that may be in this machine."""


# --- the rate --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """How fast products are done, and what says so."""

    operations: float
    """Per second, utilisation included."""
    narrow: float
    """Of products of a change, which may be in a narrower dtype."""
    words: str
    memory: float | None
    """GB of the device, where it is known."""

    def seconds(self, plan: Plan) -> float:
        return (plan.work - plan.narrow_work) / self.operations + plan.narrow_work / self.narrow


def rate_of(args: argparse.Namespace, dtype: torch.dtype, products: torch.dtype | None) -> Rate:
    """By name, as given (for products of all kinds), or measured here.

    Raises `ValueError` for options that contradict each other, and unknown names.
    """
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation {args.utilisation}: give a share above 0 and up to 1")
    if args.tflops is not None:
        if not 0 < args.tflops < 1e9:
            raise ValueError(f"--tflops {args.tflops}: give a positive number of 10^12 operations per second")
        if args.measure:
            raise ValueError("--tflops gives a rate and --measure measures one: leave one out")
    memory = DEVICES[args.device].memory if args.device in DEVICES else None
    if args.tflops is not None:
        share, given = SUSTAINED_UTILISATION if args.utilisation is None else args.utilisation, args.tflops * 1e12
        return Rate(share * given, share * given, f"{share:.0%} of the {args.tflops:g} TFLOP/s given", memory)
    dtypes = [dtype] if products in (None, dtype) else [dtype, products]
    if args.device in DEVICES and not args.measure:
        share = PEAK_UTILISATION if args.utilisation is None else args.utilisation
        peaks = [DEVICES[args.device].peak(one) for one in dtypes]
        return Rate(share * peaks[0], share * peaks[-1], f"{share:.0%} of {in_words(peaks, dtypes)} its maker publishes", memory)
    if args.device in DEVICES:
        raise ValueError(f"--measure is for a device of this machine (cpu, cuda, ...), not for {args.device} by its data sheet")
    if args.device is not None and args.device.partition(":")[0] not in HERE:
        raise unknown_name(
            "device", args.device, (*DEVICES, *HERE), f"There are {', '.join(DEVICES)}, and those of this machine."
        )
    device = choose_device(args.device)
    share = SUSTAINED_UTILISATION if args.utilisation is None else args.utilisation
    measured = [sustained_rate(one, device) for one in dtypes]
    words = f"{share:.0%} of {in_words(measured, dtypes)} torch.mm keeps up here"
    return Rate(share * measured[0], share * measured[-1], words, memory_of(device))


def in_words(rates: list[float], dtypes: list[torch.dtype]) -> str:
    """What comes before the source of one rate, or of one for each dtype."""
    if len(rates) == 1:
        return f"the {rates[0] / 1e12:.3g} TFLOP/s that"
    each = (f"{rate / 1e12:.3g} in {str(dtype).removeprefix('torch.')}" for rate, dtype in zip(rates, dtypes, strict=True))
    return f"the TFLOP/s ({' and '.join(each)}) that"


# --- the command -----------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("plan", __doc__)
    parser.add_argument("--model", default="tiny-olmoe", help="short name, hub id or local directory (default: %(default)s)")
    parser.add_argument("--layers", default="all", help="comma-separated layers, or all (default)")
    parser.add_argument("--documents", type=whole_number, default=72, metavar="N", help="documents (default: %(default)s)")
    parser.add_argument("--tokens", type=whole_number, default=512, help="tokens of each document (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of weights and products (default: %(default)s)"
    )
    parser.add_argument("--store", choices=["bfloat16", "float16"], help="of the experts' weights in memory (default: --dtype)")
    parser.add_argument(
        "--products", choices=list(get_args(ProductsName)), help="of products of what a removal changes (default: --dtype)"
    )
    parser.add_argument("--budget", metavar="SHARE|TIME", help="make a sample of the removals: 1%%, or what takes 10min or 2h")
    parser.add_argument(
        "--device",
        help=f"{', '.join(DEVICES)}: by its data sheet; cpu, cuda, ...: this machine, measured (default)",
    )
    parser.add_argument("--measure", action="store_true", help="time products on this machine for a second, as without --device")
    parser.add_argument("--tflops", type=float, metavar="RATE", help="what products keep up, in 10^12 operations per second")
    parser.add_argument(
        "--utilisation", type=float, metavar="SHARE",
        help=f"share that is reached (default: {PEAK_UTILISATION} of a published peak, {SUSTAINED_UTILISATION} of other rates)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments), resumes=False)


def run(args: argparse.Namespace) -> None:
    if args.documents < 1 or args.tokens < 2:
        raise ValueError(f"--documents {args.documents} --tokens {args.tokens}: give at least 1 document of 2 tokens")
    dtype, products, store = (None if name is None else DTYPES[name] for name in (args.dtype, args.products, args.store))
    assert dtype is not None  # it has a default
    for option, name, narrower in (("--products", args.products, products), ("--store", args.store, store)):
        if narrower is not None and narrower.itemsize >= dtype.itemsize:
            raise ValueError(f"{option} {name} is no narrower than --dtype {args.dtype}: leave it out")
    budget = None if args.budget is None else parse_budget(args.budget)
    cfg = config_of(args.model).replace(dtype=dtype, store=store)
    rate = rate_of(args, dtype, products)
    device = torch.device("cuda") if args.device in DEVICES else choose_device(args.device)
    text, layers = Text(args.documents, args.tokens), parse_layers(args.layers, cfg)
    plan = plan_of(cfg.replace(device=device), text, list(layers), products)
    if budget is not None:
        plan = affordable(plan, budget, rate.seconds)
    print("\n".join(lines_of(plan, rate, args.device)))


def config_of(model: str) -> HookedMoEConfig:
    """The config of a model by name, without a download. Raises `ValueError` for a hub id whose sizes are not known here."""
    location = locate(model)
    if location.directory is not None:
        return read_config(location.directory / "config.json")[1].replace(model_name=location.model_name)
    assert location.hub_id is not None
    if location.hub_id not in published_names():
        raise unknown_name(
            "model",
            location.hub_id,
            published_names(),
            "Its sizes are not in the package: give a directory with its config.json.",
        )
    return published_config(location.hub_id)


def lines_of(plan: Plan, rate: Rate, device: str | None) -> list[str]:
    """The plan in words."""
    cfg, text = plan.cfg, plan.text
    dtype = str(cfg.dtype).removeprefix("torch.")
    made = f"{plan.n_removals:,} removals"
    if plan.share < 1:
        made += f" ({100 * plan.share:.3g}%; the others are estimated)"
    lines = [
        f"{cfg.model_name}: {count(parameters(cfg))} parameters, {cfg.n_layers} layers of {cfg.num_experts} experts, "
        f"{cfg.experts_per_token} active",
        f"an audit of {text.documents:,} documents of {text.tokens:,} tokens, in {len(plan.layers)} layers: {made}, in {dtype}",
        "",
        f"work    {plan.work:.2g} operations of products: {share(plan.removals.blocks, plan)} removals through later layers, "
        f"{share(plan.removals.predictions, plan)} their",
        f"        predictions, {share(plan.clean + plan.clean_predictions, plan)} the intact texts, "
        f"{share(plan.first_order, plan)} first-order estimates",
        f"time    {time_of(plan, rate)} at {rate.words}",
        f"memory  {gigabytes(plan.memory)}: {gigabytes(plan.weights)} of weights, {gigabytes(plan.beside)} beside them"
        f"{fit(plan.memory, rate)}",
        f"        {gigabytes(plan.streamed_memory)} with --stream, which holds two blocks{fit(plan.streamed_memory, rate)}",
        f"disk    {gigabytes(plan.disk)} of tables; the download is what its files have, "
        f"{gigabytes(parameters(cfg) * 2)} at 2 bytes a parameter",
    ]
    if cfg.d_model < 512:
        lines.append("note    so small a model spends most of its time outside of products: expect several times as long")
    if device in DEVICES:
        lines.append(f"note    {DEVICES[device].about}: no card has been measured, the share of its peak is an assumption")
    return lines


def time_of(plan: Plan, rate: Rate) -> str:
    """How long products take; of a sample, whose budget may be a time, without what comes before it."""
    whole = duration(rate.seconds(plan))
    if plan.share == 1:
        return whole
    sample = rate.seconds(replace(plan, first_order=0.0))
    return f"{whole}, the sample {duration(sample)} of them,"


def share(part: float, plan: Plan) -> str:
    return f"{part / plan.work:.0%}"


def fit(nbytes: int, rate: Rate) -> str:
    if rate.memory is None:
        return ""
    return f"; {'fits into' if nbytes / 1e9 < rate.memory else 'more than'} {rate.memory:,.0f} GB"


def gigabytes(nbytes: int | float) -> str:
    return f"{nbytes / 1e9:,.{0 if nbytes >= 1e11 else 1 if nbytes >= 1e9 else 2}f} GB"


def count(number: int) -> str:
    """Of parameters, three digits."""
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:,.{0 if number >= 100 * unit else 1}f} {name}"


def duration(seconds: float) -> str:
    """In the unit that a person would use, two digits."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
