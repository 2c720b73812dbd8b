"""One part of a measurement, document by document into files.

Each document is a unit of work of its own: a parquet shard of each table, written atomically. A run that is killed goes on with
the first document that lacks one, and ends with the same bytes. Every shard says which measurement it is of, and shards of
another are refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar, cast

import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from hooked_moe.attribution import least_budget as least_of_gradient
from hooked_moe.engine.fan_out import Steps, side_by_side
from hooked_moe.engine.memory import demand_of, parse_bytes, variant_bytes
from hooked_moe.engine.requests import complete
from hooked_moe.measurement.document_tables import TABLES, Wanted, measure_document
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.model import HookedMoE
from hooked_moe.tables import atomic_path, write_parquet_atomic

MAX_WORKERS = 4
"""Documents measured side by side, at most: where no budget is given, each has `requests.WAITING_BYTES` of its own."""

Result = TypeVar("Result")


def measure_part(
    model: HookedMoE,
    corpus: TokenizedCorpus,
    wanted: Wanted,
    shards: Path,
    target: Path,
    identity: dict[str, str],
    *,
    progress: bool = True,
    memory_budget: int | str | None = None,
) -> None:
    """Measure every document into `shards`, and join these to `target`/<table>.parquet for each table of the part.

    Shards that are there already are kept. `identity` goes into the metadata of every file; a shard with another raises
    `ValueError`. `memory_budget` bounds the memory beside the model's weights, of all documents measured at once together: of
    fewer, where it is small.
    """
    workers, budget = workers_for(model, len(corpus.documents)), None
    if memory_budget is not None:
        whole = parse_bytes(memory_budget)
        workers = max(1, min(workers, whole // _least_budget(model, corpus, wanted)))
        budget = whole // workers
    shards.mkdir(parents=True, exist_ok=True)
    names = list(TABLES[wanted.part])
    lengths = corpus.lengths()
    paths = [{name: shards / f"{index:06d}.{name}.parquet" for name in names} for index in range(len(lengths))]
    pending = [index for index, own in enumerate(paths) if not all(_is_there(path, identity) for path in own.values())]

    def measure_documents(indices: list[int]) -> list[int]:
        works = [measure_document(model, corpus.documents[index], corpus.first, wanted, budget) for index in indices]
        for index, tables in zip(indices, _together(works), strict=True):
            for name, table in tables.items():
                write_parquet_atomic(table.replace_schema_metadata(identity), paths[index][name])
        return indices

    per_token = len(wanted.layers) * model.cfg.experts_per_token * max(1, len(wanted.orders))
    description = f"measuring, {wanted.part}"
    with tqdm(total=sum(lengths), unit="tok", desc=description, disable=not progress, smoothing=0.1) as bar:
        bar.update(sum(lengths) - sum(lengths[index] for index in pending))
        for indices in in_parallel(measure_documents, _groups(model, lengths, wanted, pending), workers):
            bar.update(sum(lengths[index] for index in indices))
            rate = bar.format_dict["rate"]
            if rate and wanted.positions is None:
                bar.set_postfix_str(f"{rate * per_token:,.0f} removals/s", refresh=False)
    for name in names:
        _merge([own[name] for own in paths], target / f"{name}.parquet")


def remove_shards(shards: Path) -> None:
    """Delete a directory of shards."""
    for path in sorted(shards.glob("*.parquet")):
        path.unlink()
    if shards.exists():
        shards.rmdir()


def _is_there(shard: Path, identity: dict[str, str]) -> bool:
    """Whether a shard has been written. Raises `ValueError` if it is one of another measurement."""
    if not shard.exists():
        return False
    metadata = pq.read_schema(shard).metadata or {}
    found = {name: metadata.get(name.encode(), b"").decode() for name in identity}
    if found != identity:
        raise ValueError(
            f"{shard} is of another measurement ({found}) than this one ({identity}), and the two cannot be mixed: "
            f"remove {shard.parent} to measure these documents anew"
        )
    return True


def _groups(model: HookedMoE, lengths: list[int], wanted: Wanted, pending: list[int]) -> list[list[int]]:
    """Documents to measure together: one, where weights are in memory. Where they are streamed, as many as fit on half of the
    free disk while they wait between layers, so that each weight is read once for all of them.
    """
    if model.spill is None:
        return [[index] for index in pending]
    each = model.cfg.experts_per_token if wanted.part != "sequence" else max(map(model.cfg.experts_in, wanted.layers))
    per_token = len(wanted.layers) * each * variant_bytes(model.cfg)
    room = shutil.disk_usage(model.spill.directory or tempfile.gettempdir()).free // 2
    groups: list[list[int]] = []
    used = room
    for index in pending:
        needed = lengths[index] * per_token
        if used + needed > room:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += needed
    return groups


def _together(works: list[Steps[Result]]) -> list[Result]:
    """What each of several measurements returns, run side by side through the layers."""
    results: list[Result | None] = [None] * len(works)

    def keep(number: int, work: Steps[Result]) -> Steps[None]:
        results[number] = yield from work

    complete(side_by_side([keep(number, work) for number, work in enumerate(works)]))
    return cast(list[Result], results)


def in_parallel(work: Callable[[list[int]], list[int]], groups: list[list[int]], workers: int) -> Iterator[list[int]]:
    """Run `work` on each group and yield what it returns as it is done. An exception in one stops the others.

    On a CPU, documents side by side use the cores better than one document on all of them, whose operations are small and
    would wait for each other's threads; the cores are shared out among a few workers.
    """
    cores = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),))
    try:
        for done in as_completed([executor.submit(work, group) for group in groups]):
            yield done.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def workers_for(model: HookedMoE, documents: int) -> int:
    """How many to measure at once, out of all documents, measured before or not: from the number of workers follows that of each
    one's threads, on which the last bits of products depend. Streamed weights are of one layer at a time, so all documents go
    through it together."""
    alone = model.cfg.device.type != "cpu" or model.spill is not None
    return 1 if alone else max(1, min(torch.get_num_threads(), documents, MAX_WORKERS))


def _least_budget(model: HookedMoE, corpus: TokenizedCorpus, wanted: Wanted) -> int:
    """Bytes that one document takes at least."""
    length = min(corpus.n_ctx, max(corpus.lengths()) + 1)  # a BOS token is no document's own
    least = demand_of(model.cfg, length, at_once=length).of_one_query(model.cfg.experts_per_token)
    return max(least, least_of_gradient(model.cfg, length)) if wanted.first_order else least


def _merge(shards: list[Path], target: Path) -> None:
    """Join shards in order, one in memory at a time."""
    schema = pq.read_schema(shards[0])
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for shard in shards:
            writer.write_table(pq.read_table(shard, use_threads=False))
