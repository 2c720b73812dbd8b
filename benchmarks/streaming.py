"""Every removal in a model that is read from disk block by block: time, bytes read and peak memory, against all of it in memory.

    python -m benchmarks.streaming                                    # DeepSeek-V2-Lite cut to 4 layers: 4.5 GB on disk
    python -m benchmarks.streaming --dir /scratch/lite --layers max   # all 27, or as many as the disk has room for
    python -m benchmarks.streaming --memory-limit 6GB --dtypes bfloat16
    python -m benchmarks.streaming --small                            # seconds; shows that it works, measures nothing

A random checkpoint of DeepSeek-V2-Lite's real widths is written in bfloat16. Fresh processes, by turns, load it with and without
`stream=True` and run `expert_effects` over some documents of random tokens, all of them in one sweep over the layers. Peak memory
is what the process had resident at most, less what it had before loading. Both have to find the same effects, to the bit.
`--memory-limit` is set on the data of the process (RLIMIT_DATA), weights and activations among it. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.tables import Table, count, parse, parser, show
from benchmarks.timing import summary
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.engine.memory import parse_bytes

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = {"layers": 3, "documents": 2, "tokens": 16}
HEADER = ["dtype", "weights", "time", "of it loading", "blocks read", "GB read", "from disk", "peak, GB"]


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    if args.measure:
        print(json.dumps(asdict(measure(args, *args.measure))))
        return []
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory() if args.dir is None else nullcontext(args.dir)
    with place as directory:
        args.dir = Path(directory)
        args.layers = layers_that_fit(args)
        cfg = checkpoints.deepseek_v2_lite(args.layers, args.small)
        checkpoints.write(cfg, args.dir)
        tables = [table(cfg, args, compare(cfg, args))]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(repeats=1)
    result.add_argument("--dir", type=Path, help="write the checkpoint there and leave it (default: a temporary directory)")
    result.add_argument("--layers", type=layers, default=4, help="2 or more, the first is dense; or max (default: %(default)s)")
    result.add_argument("--documents", type=int, default=4)
    result.add_argument("--tokens", type=int, default=256, help="of each document (default: %(default)s)")
    result.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    result.add_argument("--memory-limit", type=parse_bytes, help='of each measuring process, as "8GB"')
    result.add_argument("--measure", nargs=2, metavar=("DTYPE", "WEIGHTS"), help=argparse.SUPPRESS)  # in a fresh process
    return result


def layers(text: str) -> int | None:
    """None for "max"."""
    if text == "max":
        return None
    if int(text) < 2:
        raise argparse.ArgumentTypeError("the first layer has no experts: give 2 or more")
    return int(text)


def layers_that_fit(args: argparse.Namespace) -> int:
    """As many as asked for; with "max" as many as the disk has room for, and the model has."""
    if args.layers is not None:
        return int(args.layers)
    cfg = checkpoints.deepseek_v2_lite(2, args.small)
    sizes = {part: checkpoints.nbytes(shapes, cfg.dtype) for part, shapes in checkpoints.tensors_of(cfg).items()}
    args.dir.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in args.dir.iterdir())
    room = 0.9 * (shutil.disk_usage(args.dir).free + there) - sizes["rest"] - sizes["blocks.0"]
    return min(checkpoints.LAYERS_OF_LITE, 1 + int(room // sizes["blocks.1"]))


# --- one measurement, in a process of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    loading: float
    """Seconds."""
    measuring: float
    """Seconds."""
    peak: int
    """Bytes resident at most, above those before loading."""
    blocks_read: int | None
    """None where blocks are in memory."""
    read: int
    """Bytes, in calls that read."""
    from_disk: int
    """Bytes; those of the page cache are not."""
    digest: str
    """Of all effects."""


def measure(args: argparse.Namespace, dtype: str, weights: str) -> Measured:
    torch.set_num_threads(args.threads)
    if args.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory_limit, args.memory_limit))
    resident, io = proc("status")["VmRSS"] * 1024, proc("io")
    started = time.perf_counter()
    model = HookedMoE.from_pretrained(args.dir, dtype=DTYPES[dtype], stream=weights == "streamed")
    loaded = time.perf_counter()
    tokens = torch.randint(0, model.cfg.d_vocab, (args.documents, args.tokens), generator=torch.Generator().manual_seed(0))
    effects = expert_effects(model, tokens)
    ended, io_after = time.perf_counter(), proc("io")
    return Measured(
        loading=loaded - started,
        measuring=ended - loaded,
        peak=proc("status")["VmHWM"] * 1024 - resident,
        blocks_read=getattr(model.blocks, "blocks_read", None),
        read=io_after["rchar"] - io["rchar"],
        from_disk=io_after["read_bytes"] - io["read_bytes"],
        digest=hashlib.sha256(effects.delta_loss.nan_to_num(7.0).numpy().tobytes()).hexdigest(),
    )


def proc(name: str) -> dict[str, int]:
    """The numbers of a file of /proc/self."""
    pairs = (line.split(":", 1) for line in Path(f"/proc/self/{name}").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in pairs if value.split()[:1] and value.split()[0].isdigit()}


# --- the comparison ----------------------------------------------------------------------------------------------------------


def compare(cfg: HookedMoEConfig, args: argparse.Namespace) -> dict[tuple[str, str], list[Measured] | str]:
    """Every dtype, streamed and in memory, by turns; or why one was not measured."""
    found: dict[tuple[str, str], list[Measured] | str] = {}
    candidates = [(dtype, weights) for dtype in args.dtypes for weights in ("streamed", "in memory")]
    for candidate in candidates * args.repeats:
        runs = found.setdefault(candidate, [])
        too_much = lacking(cfg, *candidate)
        if isinstance(runs, str) or too_much:
            found[candidate] = too_much or runs
            continue
        one = measured_elsewhere(args, *candidate)
        if one is None and candidate[1] == "in memory":
            found[candidate] = "more memory than the limit allows"
        elif one is None:
            raise MemoryError(f"streamed in {candidate[0]}, it takes more than --memory-limit: give more")
        else:
            runs.append(one)
    check_equal(found)
    return found


def lacking(cfg: HookedMoEConfig, dtype: str, weights: str) -> str | None:
    """Why a model cannot be in memory, if it cannot."""
    needed = total_bytes(cfg, DTYPES[dtype])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if weights == "streamed" or needed + (2 << 30) < available:
        return None
    return f"not run: {needed / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB of memory available"


def total_bytes(cfg: HookedMoEConfig, dtype: torch.dtype) -> int:
    return sum(checkpoints.nbytes(shapes, dtype) for shapes in checkpoints.tensors_of(cfg).values())


def measured_elsewhere(args: argparse.Namespace, dtype: str, weights: str) -> Measured | None:
    """In a fresh process; None where it ran out of the memory it is allowed."""
    passed = {"--dir": args.dir.resolve(), "--threads": args.threads, "--documents": args.documents, "--tokens": args.tokens}
    if args.memory_limit:
        passed["--memory-limit"] = args.memory_limit
    given = [str(word) for pair in passed.items() for word in pair]
    command = [sys.executable, "-m", "benchmarks.streaming", *given, "--measure", dtype, weights]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode == 0:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    if args.memory_limit and ("memory" in done.stderr or done.returncode < 0):
        return None
    raise RuntimeError(f"{dtype}, {weights}: ended with code {done.returncode}\n{done.stderr[-2000:]}")


def check_equal(found: Mapping[tuple[str, str], list[Measured] | str]) -> None:
    """Raise `ArithmeticError` if streaming changes a bit of the effects in a dtype."""
    for dtype in {dtype for dtype, _ in found}:
        runs = [one for (of, _), some in found.items() if of == dtype and not isinstance(some, str) for one in some]
        if len({one.digest for one in runs}) > 1:
            raise ArithmeticError(f"streamed and in memory, the effects differ in {dtype}")


def table(cfg: HookedMoEConfig, args: argparse.Namespace, found: Mapping[tuple[str, str], list[Measured] | str]) -> Table:
    parts = checkpoints.tensors_of(cfg)
    size, block = total_bytes(cfg, cfg.dtype), checkpoints.nbytes(parts["blocks.1"], cfg.dtype)
    limit = f"; limit {args.memory_limit / 1e9:.1f} GB" if args.memory_limit else ""
    removals = args.documents * (args.tokens - 1) * len(cfg.moe_layers) * cfg.experts_per_token
    return Table(
        f"Streamed weights: DeepSeek-V2-Lite's widths, {cfg.n_layers} layers, {args.documents} documents of {args.tokens} tokens "
        f"({removals:,} removals), {count(args.threads, 'thread')}{limit}",
        f"The checkpoint has {size / 1e9:.1f} GB: {block / 1e9:.2f} GB in each block with experts and "
        f"{checkpoints.nbytes(parts['rest'], cfg.dtype) / 1e9:.2f} GB beside the blocks, all in bfloat16. "
        "The effects are the same to the bit, streamed and in memory.",
        [*HEADER, "of the checkpoint", "of two blocks in that dtype"],
        [row(dtype, weights, runs, size, block) for (dtype, weights), runs in found.items()],
    )


def row(dtype: str, weights: str, runs: list[Measured] | str, size: int, block: int) -> list[str]:
    """`size` of the checkpoint and of a `block` of it, in bytes."""
    if isinstance(runs, str):
        return [dtype, weights, runs, *[""] * 7]
    one = max(runs, key=lambda run: run.peak)
    two_blocks = 2 * block * DTYPES[dtype].itemsize / torch.bfloat16.itemsize
    return [
        dtype,
        weights,
        summary([run.loading + run.measuring for run in runs]),
        summary([run.loading for run in runs]),
        "" if one.blocks_read is None else str(one.blocks_read),
        f"{one.read / 1e9:.2f}",
        f"{one.from_disk / 1e9:.2f}",
        f"{one.peak / 1e9:.2f}",
        f"{one.peak / size:.2f}",
        f"{one.peak / two_blocks:.2f}",
    ]


if __name__ == "__main__":
    main()
