"""The options that say what is measured: which model, which text, which layers, and what their values mean."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from hooked_moe.analysis.cells import sample_positions
from hooked_moe.checks import printable, quoted
from hooked_moe.cli.console import int_or_none, whole_number
from hooked_moe.config import HookedMoEConfig
from hooked_moe.corpus import Corpus
from hooked_moe.counterfactuals.engine.memory import parse_bytes
from hooked_moe.executors import Executor, RayExecutor
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import DocumentPositions
from hooked_moe.measurement.verification import MINIMUM_TOKENS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = 42


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured and where it is kept."""
    parser.add_argument("--model", default="tiny-olmoe", help="short name, hub id or local directory (default: %(default)s)")
    parser.add_argument(
        "--corpus",
        default="held-out",
        help="held-out, wikitext-2, a .txt or .jsonl file, or a directory of such files (default: %(default)s)",
    )
    parser.add_argument(
        "--unit",
        choices=["article", "paragraph"],
        default="article",
        help="what one document is: article, what the corpus has as one (default), or paragraph, a piece between blank lines",
    )
    parser.add_argument("--layers", default="all", help="comma-separated layers, or all (default)")
    parser.add_argument("--removal", choices=["zero", "renormalize", "reroute"], default="zero")
    parser.add_argument("--context", type=whole_number, help="tokens per window (default: the model's context, 512 at most)")
    parser.add_argument(
        "--tokens", default="512", help="tokens of each document: a number (default: %(default)s, the paper's), or all"
    )
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin every window with the BOS token, which is in no statistic (default: as the model's tokenizer does)",
    )
    parser.add_argument("--documents", type=whole_number, metavar="N", help="only the first N documents of the corpus")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of weights and products (default: float32, on a GPU too: in bfloat16 an effect is off by 5e-3 nats in the median; "
        "as_released: the paper's); compare the noise floor in half precision",
    )
    parser.add_argument(
        "--store",
        choices=["bfloat16", "float16"],
        help="keep the experts' weights in this type, and widen one expert at a time to --dtype: half the memory, the same "
        "products where the checkpoint is in it too",
    )
    parser.add_argument(
        "--products",
        choices=list(get_args(ProductsName)),
        help="of removals at single tokens, multiply only what they change in this type, and add it to the clean run's products "
        "in float32: faster where the device is in it. In bfloat16 off by .4%% of an effect in the median, about 5e-5 nats; in "
        "float16, which GPUs multiply as fast, by .04%%",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="keep one block of the model in memory at a time, for models larger than memory; residuals wait on disk",
    )
    parser.add_argument("--memory", metavar="BYTES", help="bound the memory beside the model's weights, as in 4GB")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--revision", help="commit or branch of the model on the hub")
    parser.add_argument("--results", type=_path, default=Path("results"), help="where results go (default: %(default)s)")
    parser.add_argument("--run", help="name of the run (default: from its settings, so that the same settings find it again)")
    parser.add_argument(
        "--shard", metavar="I/N", help="only measure share I of N, as in a Slurm array; without it, the same command merges them"
    )
    parser.add_argument(
        "--object-store", metavar="URI", help="by way of which results come here from --ray and --shard, as in s3://bucket/prefix"
    )
    add_ray_arguments(parser)


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say on which machines it is measured."""
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="measure on the Ray cluster of this address; auto: the one of this machine, or it alone"
    )
    parser.add_argument("--ray-workers", type=whole_number, metavar="N", help="how many (default: as many as there is room for)")
    parser.add_argument("--ray-cpus", type=whole_number, metavar="N", help="of each (default: as many as a document has here)")
    parser.add_argument("--ray-gpus", type=float, metavar="X", help="of each (default: 1 if the model is on one here, else 0)")


def executor_of(args: argparse.Namespace) -> Executor | None:
    """Where the arguments say that it is measured; None: here. Raises `ValueError` for options that do not go together."""
    given = [name for name in ("workers", "cpus", "gpus") if getattr(args, f"ray_{name}") is not None]
    if args.ray is None:
        if given:
            raise ValueError(f"--ray-{given[0]} says what Ray's workers are like: give --ray auto, or the address of a cluster")
        return None
    if getattr(args, "shard", None) is not None:
        raise ValueError("--shard and --ray are two ways to share out a measurement: give one of them")
    return RayExecutor(args.ray, workers=args.ray_workers, cpus=args.ray_cpus, gpus=args.ray_gpus, log=print)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not the name of a directory")
    return Path(text)


Spelling = Callable[[str, Any], str]
"""How an option and its value are called in errors: on the command line, or in Python."""


def as_option(name: str, value: Any) -> str:
    """ "--context 17"."""
    return f"--{name} {value}"


def as_argument(name: str, value: Any) -> str:
    """ "context=17"."""
    return f"{name}={value!r}"


def first_documents(corpus: Corpus, n: int | None, spell: Spelling = as_option) -> Corpus:
    """The first `n` documents; None means all."""
    if n is None:
        return corpus
    if not 1 <= n <= len(corpus.documents):
        has = len(corpus.documents)
        raise ValueError(f"{spell('documents', n)}: corpus {corpus.name!r} has {has} documents: give a number from 1 to {has}")
    return dataclasses.replace(corpus, documents=corpus.documents[:n])


def check_run_name(name: str | None, spell: Spelling = as_option) -> None:
    if name is not None and (name == ".." or Path(name).name != name or not name or not name.isprintable()):
        said = spell("run", quoted(name)) if spell is as_option else spell("name", name)
        raise ValueError(f"{said}: give a plain name; it becomes a directory among the results")


def parse_share(text: str | None) -> Share | None:
    """The share that --shard names; None for all. Raises `ValueError`."""
    if text is None:
        return None
    try:
        return Share.parse(text)
    except ValueError as error:
        raise ValueError(f"--shard {error}") from error


def check_memory(text: str | None) -> None:
    """Raises `ValueError` for a --memory that is no number of bytes, whether or not there is anything left to measure."""
    try:
        parse_bytes(1 if text is None else text)
    except ValueError as error:
        raise ValueError(f"--memory {quoted(text)}: {error}") from error


def parse_budget(text: str, option: str = "--budget") -> Budget:
    """The budget that the option names. Raises `ValueError` for anything else."""
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def choose_device(name: str | None) -> torch.device:
    """The device asked for, once it has been seen to work; else a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float32, device=name).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:  # which, depends on how PyTorch was built
        reason = printable(str(error).splitlines()[0])
        raise ValueError(f"--device {quoted(name)} cannot be used here ({reason}); leave it out, or give cpu") from error
    return torch.device(name)


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The dtype; says so where the device multiplies it more slowly than float32."""
    if is_slow(name, device):
        print(
            f"{_slow(name)}: with --store {name} in place of --dtype {name}, weights take as little memory and products are in "
            "float32"
        )
    return DTYPES[name]


def products_named(name: ProductsName | None, device: torch.device) -> ProductsName | None:
    """What --products names; says so where it makes a measurement slower."""
    if name is not None and is_slow(name, device):
        print(f"{_slow(name)}: leave out --products")
    return name


def _slow(name: str) -> str:
    units = "matrix units" if name == "float16" else "units"
    return f"note: this CPU has no {units} for products in {name}, which take several times as long as in float32 here"


def is_slow(name: str, device: torch.device) -> bool:
    """Whether the device multiplies a dtype more slowly than float32."""
    return name in get_args(ProductsName) and device.type == "cpu" and not has_units_for(name)


def has_units_for(name: str) -> bool:
    """Whether the CPU multiplies a half-precision dtype by instructions of its own. Of those that are not x86, that is taken for
    granted."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if name == "float16":
        return torch.cpu._is_amx_fp16_supported()  # torch names none but matrix units
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def parse_layers(text: str, cfg: HookedMoEConfig) -> tuple[int, ...]:
    """The layers to measure; "all" means all that have experts."""
    if text == "all":
        return tuple(cfg.moe_layers)
    numbers = [int_or_none(part) for part in text.split(",")]
    layers = sorted({number for number in numbers if number is not None})
    if None in numbers:
        raise ValueError(f"--layers {quoted(text)}: give numbers separated by commas, as in 0,4,7, or all")
    for layer in layers:
        if not 0 <= layer < cfg.n_layers:
            raise ValueError(f"--layers: layer {layer} is out of range; the model has layers 0 to {cfg.n_layers - 1}")
        if not cfg.experts_in(layer):
            raise ValueError(f"--layers: layer {layer} is dense, it has no experts; layers {cfg.moe_layers} have")
    return tuple(layers)


def parse_tokens(text: str) -> int | None:
    """How many tokens of each document to read; None for all."""
    if text == "all":
        return None
    number = int_or_none(text)
    if number is None or number < MINIMUM_TOKENS:
        raise ValueError(f"--tokens {quoted(text)}: give all, or a number of tokens from {MINIMUM_TOKENS}")
    return number


def parse_sample(text: str, valid: list[tuple[int, int]]) -> DocumentPositions | None:
    """The positions to measure: None for all, or the paper's kind of sample, frozen by its seed."""
    if text == "all":
        return None
    return draw_sample(int_or_none(text), valid, as_option("positions", quoted(text)))


def draw_sample(n: int | None, valid: list[tuple[int, int]], said: str) -> DocumentPositions:
    """The paper's kind of sample, frozen by its seed. Raises `ValueError`, which begins with what was said, for other `n`."""
    if n is None or not 3 <= n <= len(valid):
        raise ValueError(f"{said}: give all, or a number from 3 to {len(valid)}, the valid positions of this corpus")
    return frozenset(valid[index] for index in sample_positions(len(valid), n, SEED))
