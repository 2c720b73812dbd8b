"""A whole audit of a model that is read from disk block by block: time, bytes read and peak memory, against one in memory.

    python -m benchmarks.streaming                                    # DeepSeek-V2-Lite cut to 4 layers: 4.5 GB on disk
    python -m benchmarks.streaming --layers full --documents 1 --tokens 64 --precisions stored-bfloat16
    python -m benchmarks.streaming --layers full --documents 4 --tokens 64 --precisions stored-bfloat16 --budget 1%
    python -m benchmarks.streaming --memory-limit 6GB --precisions bfloat16
    python -m benchmarks.streaming --small                            # seconds; shows that it works, measures nothing

A random checkpoint of DeepSeek-V2-Lite's real widths is written in bfloat16, and removed in the end (`--dir` leaves it): all 27
layers, 31.4 GB, with `--layers full`, which is skipped where the disk has no room for them. Fresh processes, by turns, run
`hooked-moe audit` over documents of random tokens with and without `--stream`: checksum of the weights, verification, noise
floor, every removal, first-order effects, analysis and report. Both have to find the same effects. "reads" are bytes of weights
read by bytes of weights on disk; "GB read" is what the process read in all, residual streams that waited in files included. Peak
memory is what the process had resident at most, Python, torch and the report's figures among it. `--memory-limit` is set on the
data of the process (RLIMIT_DATA), weights and activations among it. With `--budget` a sample of the removals is made. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers
import torch

from benchmarks import checkpoints
from benchmarks.tables import Table, count, parse, parser, show
from benchmarks.timing import summary
from hooked_moe import HookedMoEConfig
from hooked_moe.cli.audit import parse_arguments
from hooked_moe.cli.measured_run import analyse, open_run
from hooked_moe.counterfactuals.engine.memory import parse_bytes
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.verification import LOSS_TOLERANCE

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {
    "float32": (torch.float32, ["--dtype", "float32"]),
    "stored-bfloat16": (torch.float32, ["--store", "bfloat16"]),
    "bfloat16": (torch.bfloat16, ["--dtype", "bfloat16"]),
}
"""Each precision's dtype of products, and its options."""
SMALL = {"layers": 3, "documents": 2, "tokens": 16}
HEADER = ["precision", "weights", "time", "of it opening", "of it analysing", "reads", "GB read", "from disk"]


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    if args.measure:
        print(json.dumps(asdict(measure(args, *args.measure))))
        return []
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory() if args.dir is None else nullcontext(args.dir)
    with place as directory:
        args.dir = Path(directory)
        args.dir.mkdir(parents=True, exist_ok=True)
        why = lacking_disk(args)
        if why is not None:
            print(why)
            return []
        args.layers = layers_that_fit(args)
        cfg = checkpoints.deepseek_v2_lite(args.layers, args.small)
        checkpoints.write(cfg, args.dir)
        write_texts(cfg, args)
        tables = [table(cfg, args, compare(cfg, args))]
    show(tables)
    return tables


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(repeats=1)
    result.add_argument("--dir", type=Path, help="write the checkpoint there and leave it (default: a temporary directory)")
    result.add_argument(
        "--layers",
        type=layers,
        default=4,
        help="2 or more, the first is dense; max: as many as the disk has room for; full: all 27 or none (default: %(default)s)",
    )
    result.add_argument("--documents", type=int, default=4)
    result.add_argument("--tokens", type=int, default=256, help="of each document (default: %(default)s)")
    result.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="PRECISION")
    result.add_argument("--budget", help="of every audit, as hooked-moe audit takes it (default: all removals)")
    result.add_argument("--only-streamed", action="store_true", help="nothing in memory to compare with")
    result.add_argument("--memory-limit", type=parse_bytes, help='of each measuring process, as "8GB"')
    result.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--measure", nargs=2, metavar=("PRECISION", "WEIGHTS"), help=argparse.SUPPRESS)  # in a fresh process
    return result


def layers(text: str) -> int | str:
    if text in ("max", "full"):
        return text
    if int(text) < 2:
        raise argparse.ArgumentTypeError("the first layer has no experts: give 2 or more")
    return int(text)


def lacking_disk(args: argparse.Namespace) -> str | None:
    """Why all layers cannot be measured, where they are asked for and the disk has no room for them."""
    fitting = layers_that_fit(argparse.Namespace(**{**vars(args), "layers": "max"}))
    if args.layers != "full" or fitting == checkpoints.LAYERS_OF_LITE:
        return None
    return f"skipped: {args.dir} has room for {fitting} of the {checkpoints.LAYERS_OF_LITE} layers"


def layers_that_fit(args: argparse.Namespace) -> int:
    """As many as asked for; with "max" as many as the disk has room for, and the model has."""
    if isinstance(args.layers, int):
        return args.layers
    if args.layers == "full":
        return checkpoints.LAYERS_OF_LITE
    cfg = checkpoints.deepseek_v2_lite(2, args.small)
    sizes = {part: checkpoints.nbytes(shapes, cfg.dtype) for part, shapes in checkpoints.tensors_of(cfg).items()}
    there = sum(file.stat().st_size for file in args.dir.iterdir() if file.is_file())
    room = 0.9 * (shutil.disk_usage(args.dir).free + there) - sizes["rest"] - sizes["blocks.0"]
    return min(checkpoints.LAYERS_OF_LITE, 1 + int(room // sizes["blocks.1"]))


def write_texts(cfg: HookedMoEConfig, args: argparse.Namespace) -> None:
    """A tokenizer whose tokens are the numbers of tokens, and documents of random ones."""
    words = tokenizers.models.WordLevel({str(token): token for token in range(cfg.d_vocab)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(args.dir / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.d_vocab, (args.documents, args.tokens), generator=generator).tolist()
    records = [{"id": str(number), "text": " ".join(map(str, row))} for number, row in enumerate(tokens)]
    texts(args).write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(args: argparse.Namespace) -> Path:
    return args.dir / "documents.jsonl"


# --- one measurement, in a process of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    opening: float
    """Seconds for loading and the checksum of the weights."""
    measuring: float
    """Seconds for verification and removals."""
    analysing: float
    """Seconds for analysis and report."""
    peak: int
    """Bytes resident at most."""
    of_blocks: int | None
    """Bytes of blocks' weights read after loading; None where blocks are in memory."""
    read: int
    """Bytes, in calls that read."""
    from_disk: int
    """Bytes; those of the page cache are not."""


def measure(args: argparse.Namespace, precision: str, weights: str) -> Measured:
    torch.set_num_threads(args.threads)
    if args.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory_limit, args.memory_limit))
    words = ["--model", str(args.dir), "--corpus", str(texts(args)), "--results", str(args.results), "--device", "cpu"]
    words += ["--tokens", "all", "--run", "run", *DTYPES[precision][1], *(["--stream"] if weights == "streamed" else [])]
    budget = None if args.budget is None else Budget.parse(args.budget)
    read, times = proc("io"), [time.perf_counter()]
    with redirect_stdout(io.StringIO()), open_run(parse_arguments(words), budget) as run:
        times.append(time.perf_counter())
        if budget is None:
            run.require("position", progress=False)
        else:
            run.require_sample(progress=False)
        times.append(time.perf_counter())
        analyse(run)
    times.append(time.perf_counter())
    opening, measuring, analysing = np.diff(times).tolist()
    read_after = proc("io")
    return Measured(
        opening,
        measuring,
        analysing,
        peak=proc("status")["VmHWM"] * 1024,
        of_blocks=getattr(run.model.blocks, "bytes_read", None),
        read=read_after["rchar"] - read["rchar"],
        from_disk=read_after["read_bytes"] - read["read_bytes"],
    )


def proc(name: str) -> dict[str, int]:
    """The numbers of a file of /proc/self."""
    pairs = (line.split(":", 1) for line in Path(f"/proc/self/{name}").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in pairs if value.split()[:1] and value.split()[0].isdigit()}


# --- the comparison ----------------------------------------------------------------------------------------------------------

Found = Mapping[tuple[str, str], list[Measured] | str]


def compare(cfg: HookedMoEConfig, args: argparse.Namespace) -> Found:
    """Every precision, streamed and in memory, by turns; or why one was not measured."""
    found: dict[tuple[str, str], list[Measured] | str] = {}
    effects: dict[str, np.ndarray] = {}
    kinds = ("streamed",) if args.only_streamed else ("streamed", "in memory")
    candidates = [(precision, weights) for precision in args.precisions for weights in kinds]
    for candidate in candidates * args.repeats:
        runs = found.setdefault(candidate, [])
        too_much = lacking(cfg, *candidate)
        if isinstance(runs, str) or too_much:
            found[candidate] = too_much or runs
            continue
        with tempfile.TemporaryDirectory() as results:
            one = measured_elsewhere(args, Path(results), *candidate)
            if one is not None:
                runs.append(one)
                check_equal(candidate[0], effects, read_effects(Path(results), args.budget is not None))
            elif candidate[1] == "in memory":
                found[candidate] = "more memory than the limit allows"
            else:
                raise MemoryError(f"streamed in {candidate[0]}, it takes more than --memory-limit: give more")
    return found


def lacking(cfg: HookedMoEConfig, precision: str, weights: str) -> str | None:
    """Why a model cannot be in memory, if it cannot."""
    needed = total_bytes(cfg, DTYPES[precision][0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if weights == "streamed" or needed + (2 << 30) < available:
        return None
    return f"not run: {needed / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB of memory available"


def total_bytes(cfg: HookedMoEConfig, dtype: torch.dtype) -> int:
    return sum(checkpoints.nbytes(shapes, dtype) for shapes in checkpoints.tensors_of(cfg).values())


def measured_elsewhere(args: argparse.Namespace, results: Path, precision: str, weights: str) -> Measured | None:
    """In a fresh process; None where it ran out of the memory it is allowed."""
    passed = {"--dir": args.dir.resolve(), "--threads": args.threads, "--results": results}
    if args.memory_limit:
        passed["--memory-limit"] = args.memory_limit
    if args.budget is not None:
        passed["--budget"] = args.budget
    given = [str(word) for pair in passed.items() for word in pair]
    command = [sys.executable, "-m", "benchmarks.streaming", *given, "--measure", precision, weights]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode == 0:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    if args.memory_limit and ("memory" in done.stderr or done.returncode < 0):
        return None
    raise RuntimeError(f"{precision}, {weights}: ended with code {done.returncode}\n{done.stderr[-2000:]}")


def read_effects(results: Path, sampled: bool) -> np.ndarray:
    (path,) = results.glob(f"*/run/{'sampled_effects' if sampled else 'effects'}.parquet")
    columns = pq.read_table(path, columns=["delta_loss", *([] if sampled else ["first_order_curved"])])
    return np.nan_to_num(np.stack([column.to_numpy() for column in columns]), nan=7.0)


def check_equal(precision: str, known: dict[str, np.ndarray], found: np.ndarray) -> None:
    """Raise `ArithmeticError` if streaming changes the effects of a precision by more than rounding."""
    difference = float(np.abs(found - known.setdefault(precision, found)).max())
    if not difference <= LOSS_TOLERANCE[DTYPES[precision][0]]:
        raise ArithmeticError(f"streamed and in memory, the effects differ by {difference:.2g} nats in {precision}")


def table(cfg: HookedMoEConfig, args: argparse.Namespace, found: Found) -> Table:
    parts = checkpoints.tensors_of(cfg)
    sizes = {part: checkpoints.nbytes(shapes, cfg.dtype) for part, shapes in parts.items()}
    limit = f"; limit {args.memory_limit / 1e9:.1f} GB" if args.memory_limit else ""
    removals = f"{args.documents * (args.tokens - 1) * len(cfg.moe_layers) * cfg.experts_per_token:,} removals"
    removals = removals if args.budget is None else f"--budget {args.budget} of {removals}"
    return Table(
        f"A streamed audit: DeepSeek-V2-Lite's widths, {cfg.n_layers} layers, {args.documents} documents of {args.tokens} tokens "
        f"({removals}), {count(args.threads, 'thread')}{limit}",
        f"The checkpoint has {sum(sizes.values()) / 1e9:.1f} GB: {sizes['blocks.1'] / 1e9:.2f} GB in each block with experts and "
        f"{sizes['rest'] / 1e9:.2f} GB beside the blocks, all in bfloat16. Streamed and in memory, the effects are the same but "
        "for rounding.",
        [*HEADER, "peak, GB", "of the checkpoint"],
        [row(*candidate, runs, sizes) for candidate, runs in found.items()],
    )


def row(precision: str, weights: str, runs: list[Measured] | str, sizes: Mapping[str, int]) -> list[str]:
    """`sizes` in bytes of every part of the checkpoint."""
    if isinstance(runs, str):
        return [precision, weights, runs, *[""] * 7]
    one = max(runs, key=lambda run: run.peak)
    size = sum(sizes.values())
    weights_read = size if one.of_blocks is None else sizes["rest"] + one.of_blocks
    return [
        precision,
        weights,
        summary([run.opening + run.measuring + run.analysing for run in runs]),
        summary([run.opening for run in runs]),
        summary([run.analysing for run in runs]),
        f"{weights_read / size:.2f}",
        f"{one.read / 1e9:.2f}",
        f"{one.from_disk / 1e9:.2f}",
        f"{one.peak / 1e9:.2f}",
        f"{one.peak / size:.2f}",
    ]


if __name__ == "__main__":
    main()
