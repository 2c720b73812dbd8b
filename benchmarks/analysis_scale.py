"""What analysing a run costs: seconds and peak memory for made-up effect tables of growing length.

    python -m benchmarks.analysis_scale                    # up to 300,000 tokens x 16 layers x 8 experts: 38 million removals
    python -m benchmarks.analysis_scale --sequence         # the same removals in the sequence scope besides
    python -m benchmarks.analysis_scale --threads 2
    python -m benchmarks.analysis_scale --small            # seconds; shows that it works, measures nothing

The number of documents stays the same, so that a peak which does not grow shows that memory does not depend on tokens. The
analysis runs in a process of its own, with everything it derives: savings, cells, permutations, sign flips, bootstraps, ceilings,
choice models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tables import Table, count, parse, parser, show
from hooked_moe.tables import DOCUMENTS, EFFECTS, EFFECTS_SEQUENCE, EXPERT_WEIGHTS, ROUTING

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 8 * 2**30
"""Bytes that the analysis must fit into."""
SMALL = {"tokens": [2_000, 4_000], "documents": 20, "layers": 2, "experts": 16}
ANALYSE = """
import json, resource, sys, time
from hooked_moe.analysis import analyse_run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
cells = analyse_run(sys.argv[1], n_experts=int(sys.argv[2]))
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = {name: sum(cell.outcome == name for cell in cells) for name in {cell.outcome for cell in cells}}
print(json.dumps({"seconds": seconds, "before": before * 1024, "peak": peak * 1024, "outcomes": outcomes}))
"""


@dataclass(frozen=True)
class Size:
    tokens: int
    documents: int
    layers: int
    experts: int
    active: int = 8

    @property
    def rows(self) -> int:
        return self.tokens * self.layers * self.active


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, SMALL)
    rows = []
    for tokens in args.tokens:
        size = Size(tokens, args.documents, args.layers, args.experts)
        with tempfile.TemporaryDirectory(prefix="analysis-scale-", dir=args.directory) as directory:
            write_run(Path(directory), size, sequence=args.sequence)
            on_disk = sum(path.stat().st_size for path in Path(directory).iterdir())
            measured = analysed(Path(directory), size, args.threads)
        if measured["peak"] > MEMORY:
            raise RuntimeError(f"{size.rows:,} rows took {measured['peak'] / 2**30:.1f} GiB, more than {MEMORY / 2**30:.0f}")
        scopes = 1 + args.sequence
        rows.append(
            [
                f"{tokens:,}",
                f"{size.rows * scopes:,}",
                f"{on_disk / 2**20:,.0f}",
                f"{measured['seconds']:,.0f}",
                f"{size.rows * scopes / measured['seconds']:,.0f}",
                f"{measured['peak'] / 2**20:,.0f}",
                f"{(measured['peak'] - measured['before']) / 2**20:,.0f}",
            ]
        )
    table = Table(
        f"Analysis: {args.documents} documents, {args.layers} layers of {args.experts} experts top-{Size.active}, "
        f"{'both scopes' if args.sequence else 'scope position'}; {count(args.threads, 'thread')}",
        "Rows are removals. Peak memory is of the whole process; the last column is without what the imports take (PyTorch).",
        ("tokens", "rows", "MiB on disk", "s", "rows/s", "peak MiB", "peak MiB over imports"),
        rows,
    )
    show([table])
    return [table]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--tokens", type=int, nargs="+", default=[30_000, 100_000, 300_000], help="(default: %(default)s)")
    result.add_argument("--documents", type=int, default=600, help="(default: %(default)s)")
    result.add_argument("--layers", type=int, default=16, help="(default: %(default)s)")
    result.add_argument("--experts", type=int, default=64, help="routed experts of a layer (default: %(default)s)")
    result.add_argument("--sequence", action="store_true", help="effects of the sequence scope too")
    result.add_argument("--directory", type=Path, help="where the tables lie meanwhile, 2 GB (default: the system's)")
    return result


def analysed(directory: Path, size: Size, threads: int) -> dict[str, float]:
    """Seconds and bytes, as the process that analyses reports them."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", ANALYSE, str(directory), str(size.experts)],
        env={**os.environ, **limits, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- made-up tables --------------------------------------------------------------------------------------------------


def write_run(directory: Path, size: Size, sequence: bool) -> None:
    """Every measured table that the analysis streams, one document at a time: loss changes with heavy tails, alike within a
    document, that follow the routing weight a little."""
    random = np.random.default_rng(0)
    lengths = np.full(size.documents, size.tokens // size.documents)
    lengths[: size.tokens % size.documents] += 1
    popularity = random.normal(size=(size.layers, size.experts))
    loudness = random.gamma(20, 0.05, size=(size.layers, size.experts))
    with (
        pq.ParquetWriter(directory / "effects.parquet", EFFECTS, compression="zstd") as effects,
        pq.ParquetWriter(directory / "routing.parquet", ROUTING, compression="zstd") as routing,
    ):
        everywhere = pq.ParquetWriter(directory / "effects_sequence.parquet", EFFECTS_SEQUENCE) if sequence else None
        for document, length in enumerate(lengths):
            columns = document_effects(document, int(length), size, popularity, loudness, random)
            effects.write_table(table_of(columns, EFFECTS))
            routing.write_table(table_of(document_routing(document, columns["expert"], size, random), ROUTING))
            if everywhere is not None:
                shaken = columns["delta_loss"] + 0.01 * random.standard_t(3, size=columns["expert"].shape)
                everywhere.write_table(table_of({**columns, "delta_loss": shaken}, EFFECTS_SEQUENCE))
        if everywhere is not None:
            everywhere.close()
    experts = np.arange(size.layers * size.experts)
    weights: dict[str, np.ndarray] = {name: random.gamma(50, 0.01, size=len(experts)) for name in EXPERT_WEIGHTS.names}
    weights |= {"layer": experts // size.experts, "expert": experts % size.experts}
    pq.write_table(table_of(weights, EXPERT_WEIGHTS), directory / "expert_weights.parquet")
    names = [f"{document}" for document in range(size.documents)]
    domains = [f"domain {document % 3}" for document in range(size.documents)]
    documents = {"document": np.arange(size.documents), "id": names, "domain": domains, "title": names, "n_tokens": lengths}
    pq.write_table(pa.table(documents).cast(DOCUMENTS), directory / "documents.parquet")


def document_effects(
    document: int, length: int, size: Size, popularity: np.ndarray, loudness: np.ndarray, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """Columns of an EFFECTS table, each [token, layer, slot] or broadcast to that."""
    shape = (length, size.layers, size.active)
    noise = random.gumbel(size=(length, size.layers, size.experts))
    expert = np.argpartition(-(popularity + noise), size.active, axis=2)[:, :, : size.active]
    weight = -np.sort(-random.dirichlet(np.full(size.active + 4, 2.0), size=shape[:2])[..., : size.active], axis=2)
    norm = loudness[np.arange(size.layers)[:, None], expert] * random.gamma(10, 0.1, size=shape)
    mood = np.exp(0.4 * random.normal(size=(size.layers, 1)))
    delta = 0.02 * random.standard_t(3, size=shape) * mood + 0.1 * (weight - weight.mean())
    delta[-1] = np.nan
    return {
        "document": np.full(shape, document),
        "position": np.arange(length)[:, None, None],
        "layer": np.arange(size.layers)[:, None],
        "slot": np.arange(size.active),
        "expert": expert,
        "routing_weight": weight,
        "output_norm": norm,
        "gap_norm": weight * norm,
        "rest_cosine": random.uniform(-1, 1, size=shape),
        "rest_norm": random.gamma(20, 0.05, size=shape),
        "baseline_loss": random.gamma(4, 0.8, size=(length, 1, 1)),
        "delta_loss": delta,
        "kl": 0.02 * random.gamma(0.5, size=shape) * weight,
        "first_order": 0.7 * delta + 0.01 * random.normal(size=shape),
        "first_order_curved": 0.9 * delta + 0.005 * random.normal(size=shape),
    }


def document_routing(document: int, expert: np.ndarray, size: Size, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of a ROUTING table that counts these selections."""
    shape = (size.layers, size.experts)
    key = np.arange(size.layers)[:, None] * size.experts + expert
    n_tokens = np.bincount(key.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    return {
        "document": np.full(shape, document),
        "layer": np.arange(size.layers)[:, None],
        "expert": np.arange(size.experts),
        "n_tokens": n_tokens,
        "document_tokens": np.full(shape, len(expert)),
        "sum_probability": n_tokens * random.uniform(0.1, 0.2, size=shape),
        "sum_entropy": n_tokens * random.uniform(1, 3, size=shape),
        "max_activation": np.where(n_tokens > 0, random.gamma(9, 0.3, size=shape), np.nan),
    }


def table_of(columns: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    shape = np.broadcast_shapes(*(columns[name].shape for name in schema.names))
    arrays = [np.broadcast_to(columns[field.name], shape).ravel().astype(field.type.to_pandas_dtype()) for field in schema]
    return pa.table(arrays, schema=schema)


if __name__ == "__main__":
    main()
