"""How fast a checkpoint becomes a model, and how much memory that takes at most, against transformers and the bare disk.

    python -m benchmarks.loading                    # DeepSeek-V2-Lite cut to 3 layers: 3.4 GB on disk, 6.7 GB in float32
    python -m benchmarks.loading --layers 2 --repeats 5
    python -m benchmarks.loading --small            # seconds; shows that it works, measures nothing

A random checkpoint is written with the real widths, names and shards of DeepSeek-V2-Lite in bfloat16, then loaded in fresh
processes that take turns. Each reads the files once before, so that the disk does not count, and time runs until every page of
every weight has been touched: transformers may leave weights in the mapped file until they are used. Peak memory is what the
process had resident at most, less what it had before loading (Linux only); of a mapped file, pages that were read count.

Target: no slower than transformers, and a peak of no more than the model and one tensor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.cli.console import tolerate_any_console
from hooked_moe.config import YarnScaling
from hooked_moe.loading.checkpoint import INDEX_FILE
from weights_conversion import CONVERSIONS
from weights_conversion.weight_map import slots_by_parameter

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
CHUNK = 16 * MIB
SHARDS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOADERS = ("hooked_moe", "transformers")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="build the checkpoint there and leave it (default: a temporary directory)")
    parser.add_argument("--layers", type=int, default=3, help="the first is dense (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny widths")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "DTYPE"), help=argparse.SUPPRESS)  # in a fresh process
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(asdict(measure(args.dir, *args.measure))))
        return 0
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    if not Path("/proc/self/status").is_file():
        raise OSError("peak memory is read from /proc/self/status, which this system does not have: run it on Linux")
    if args.layers < 2 or args.repeats < 1:
        raise ValueError("give --layers 2 or more, for the first has no experts, and --repeats 1 or more")
    cfg = deepseek_v2_lite(args.layers, args.small)
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory() if args.dir is None else nullcontext(args.dir)
    with place as directory:
        sizes = build(cfg, Path(directory))
        tolerate_any_console()
        print(f"{args.layers} layers, {sizes.parameters:,} parameters, {sizes.tensors:,} tensors in {SHARDS} files")
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.repeats} repeats\n")
        print(as_table(compare(Path(directory), args.repeats), sizes))


# --- the checkpoint --------------------------------------------------------------------------------------------------------


def deepseek_v2_lite(n_layers: int, small: bool) -> HookedMoEConfig:
    widths: dict[str, Any] = {
        "d_model": 2048,
        "d_vocab": 102400,
        "d_head": 192,
        "d_rotary": 64,
        "d_value": 128,
        "kv_lora_rank": 512,
        "d_expert": 1408,
        "d_shared": 2816,
        "d_mlp": 10944,
    }
    if small:
        widths = {name: width // 64 * 2 for name, width in widths.items()}
    return HookedMoEConfig(
        **widths,
        model_type="deepseek_v2",
        n_layers=n_layers,
        n_ctx=163840,
        n_heads=16,
        n_key_value_heads=16,
        rotary_interleaved=True,
        rotary_scaling=YarnScaling(factor=40.0, original_ctx=4096, mscale=0.707, mscale_all_dim=0.707),
        num_experts=64,
        experts_per_token=6,
        dense_layers=(0,),
        eps=1e-6,
        dtype=torch.bfloat16,
    )


@dataclass(frozen=True)
class Sizes:
    parameters: int
    tensors: int
    largest: int
    """Bytes of the largest tensor, as stored."""

    def stored(self, dtype: str) -> int:
        """Bytes of the model in that dtype."""
        return self.parameters * DTYPES[dtype].itemsize


def build(cfg: HookedMoEConfig, directory: Path) -> Sizes:
    """Write the checkpoint, unless it is there already; config.json comes last, so that half a checkpoint is none.

    Raises `OSError` where disk or memory are short, and `FileExistsError` for a directory with something else in it.
    """
    shapes = tensor_shapes(cfg)
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    sizes = Sizes(sum(counts), len(counts), max(counts) * cfg.dtype.itemsize)
    config = CONVERSIONS["deepseek_v2"].to_hf(cfg)
    file = directory / "config.json"
    if file.is_file() and json.loads(file.read_text()) == json.loads(json.dumps(config)):
        check_room(sizes, directory, to_write=0)
        return sizes
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds something else than this checkpoint: give a new directory")
    check_room(sizes, directory, to_write=sizes.stored("bfloat16"))
    write_weights(shapes, sizes.stored("bfloat16"), directory)
    file.write_text(json.dumps(config, indent=2))
    return sizes


def tensor_shapes(cfg: HookedMoEConfig) -> dict[str, tuple[int, ...]]:
    """By the names of the hub, each expert for itself, in the order of the layers."""
    parameters = dict(HookedMoE(cfg.replace(device=torch.device("meta"))).named_parameters())
    slots = slots_by_parameter(CONVERSIONS["deepseek_v2"].weights, cfg, parameters)
    return {slot.hf_name: tuple(slot.of(parameters[name]).shape) for name in parameters for slot in slots[name]}


def check_room(sizes: Sizes, directory: Path, to_write: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < 1.05 * to_write:
        raise OSError(f"{directory} has {in_gb(free)} free, and the checkpoint takes {in_gb(to_write)}: give another --dir")
    # transformers takes 2.3 times the model in float32
    needed, available = int(2.4 * sizes.stored("float32")), status("MemAvailable", Path("/proc/meminfo"))
    if available < needed:
        raise OSError(f"{in_gb(available)} of memory are available, and this may take {in_gb(needed)}: give fewer --layers")


def write_weights(shapes: dict[str, tuple[int, ...]], total: int, directory: Path) -> None:
    """Random bfloat16 weights, one shard in memory at a time."""
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    shards = list(in_shards(shapes, total))
    for number, names in enumerate(tqdm(shards, desc="writing", unit="file", disable=None), start=1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"  # as DeepSeek pads them
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for name, tensor in tensors.items():
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def in_shards(shapes: dict[str, tuple[int, ...]], total: int) -> Iterator[list[str]]:
    """The names in their order, in parts of about equal bytes."""
    parts: list[list[str]] = [[] for _ in range(SHARDS)]
    before = 0
    for name, shape in shapes.items():
        parts[min(before * SHARDS // total, SHARDS - 1)].append(name)
        before += torch.Size(shape).numel() * torch.bfloat16.itemsize
    return (part for part in parts if part)


# --- one measurement, in a process of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    seconds: float
    cpu: float
    """Seconds of computation, of all threads together: less moved by what else the machine does."""
    peak: int
    """Bytes resident at most, above those before."""


def measure(directory: Path, loader: str, dtype: str) -> Measured:
    load = {"read": reader, "hooked_moe": hooked_moe_loader, "transformers": transformers_loader}[loader]()
    read_files(directory)  # into the page cache
    before = status("VmRSS")
    started, started_cpu = time.perf_counter(), time.process_time()
    touch(load(directory, dtype))
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return Measured(seconds, cpu, status("VmHWM") - before)


Load = Callable[[Path, str], Iterable[torch.Tensor]]


def reader() -> Load:
    def load(directory: Path, dtype: str) -> Iterable[torch.Tensor]:
        read_files(directory)
        return ()

    return load


def read_files(directory: Path) -> None:
    buffer = bytearray(CHUNK)
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def hooked_moe_loader() -> Load:
    from hooked_moe import HookedMoE

    return lambda directory, dtype: HookedMoE.from_pretrained(directory, dtype=DTYPES[dtype]).parameters()


def transformers_loader() -> Load:
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v2 import modeling_deepseek_v2  # noqa: F401 (imported before the clock runs)
    from transformers.utils import logging

    logging.disable_progress_bar()
    return lambda directory, dtype: AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).parameters()


def touch(weights: Iterable[torch.Tensor]) -> None:
    """Read one value of every page of 4 KiB."""
    for weight in weights:
        weight.detach().flatten()[:: 4096 // weight.element_size()].sum()


def status(key: str, file: Path = Path("/proc/self/status")) -> int:
    """A line of /proc, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


# --- the comparison ----------------------------------------------------------------------------------------------------------


def compare(directory: Path, repeats: int) -> dict[tuple[str, str], list[Measured]]:
    """Every loader in every dtype, by turns; the order is reversed each time."""
    loaders = [loader for loader in LOADERS if importlib.util.find_spec(loader)]
    candidates = [("read", "bfloat16"), *((loader, dtype) for dtype in DTYPES for loader in loaders)]
    found: dict[tuple[str, str], list[Measured]] = {candidate: [] for candidate in candidates}
    order = [candidate for turn in range(repeats) for candidate in candidates[:: -1 if turn % 2 else 1]]
    for candidate in tqdm(order, desc="loading", disable=None):
        found[candidate].append(measured_elsewhere(directory, *candidate))
    return found


def measured_elsewhere(directory: Path, loader: str, dtype: str) -> Measured:
    command = [sys.executable, "-m", "benchmarks.loading", "--dir", str(directory.resolve()), "--measure", loader, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        raise OSError(f"loading with {loader} in {dtype} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def as_table(found: dict[tuple[str, str], list[Measured]], sizes: Sizes) -> str:
    """Markdown: medians, and ratios of medians. CPU time is of all threads together."""
    largest = f"{sizes.largest / MIB:,.0f}"
    columns = (
        "time, s",
        "CPU, s",
        "time of reading",
        "time of transformers",
        "CPU of transformers",
        "peak, MiB",
        "peak of model",
    )
    rows = [["", *columns, f"peak - model, MiB (largest tensor: {largest})"], ["---"] * 9]
    medians = {candidate: median_of(runs) for candidate, runs in found.items()}
    reading = medians.pop(("read", "bfloat16"))
    rows.append(["reading the bytes", f"{reading.seconds:.2f}", f"{reading.cpu:.2f}", "1", *[""] * 5])
    for (loader, dtype), one in medians.items():
        peer = medians.get(("transformers", dtype))  # which may not be installed
        model = sizes.stored(dtype)
        rows.append(
            [
                *(f"{loader}, {dtype}", f"{one.seconds:.2f}", f"{one.cpu:.2f}", f"{one.seconds / reading.seconds:.2f}"),
                *((f"{one.seconds / peer.seconds:.2f}", f"{one.cpu / peer.cpu:.2f}") if peer else ("", "")),
                *(f"{one.peak / MIB:,.0f}", f"{one.peak / model:.3f}", f"{(one.peak - model) / MIB:,.0f}"),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def median_of(runs: list[Measured]) -> Measured:
    return Measured(median(one.seconds for one in runs), median(one.cpu for one in runs), round(median(one.peak for one in runs)))


def in_gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
