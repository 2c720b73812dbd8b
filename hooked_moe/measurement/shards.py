"""One part of a measurement, document by document into files.

Each document is measured on its own, into a shard of each table (`shard_files`). A run that was killed resumes with the first
document that has none, and ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hooked_moe.counterfactuals.engine.memory import demand_of, parse_bytes, variant_bytes
from hooked_moe.counterfactuals.engine.steps import Steps, run_without_grad, side_by_side
from hooked_moe.counterfactuals.first_order import least_budget as least_budget_of_gradients
from hooked_moe.loading.spill import spill_directory
from hooked_moe.loading.streaming import spill_of
from hooked_moe.measurement.document_tables import TABLES, measure_document
from hooked_moe.measurement.part_spec import PartSpec
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.progress import progress_bar
from hooked_moe.tables import atomic_path
from hooked_moe.transformer import Transformer

MAX_WORKERS = 4
"""The most documents measured side by side: where no budget is given, each has `requests.WAITING_BYTES` of its own."""

ATTEMPTS = 2
"""How often a document is measured in one run whose shards are damaged."""

Result = TypeVar("Result")


def measure_part(
    model: Transformer,
    corpus: TokenizedCorpus,
    spec: PartSpec,
    shards: Path,
    target: Path,
    identity: dict[str, str],
    *,
    progress: bool = True,
    memory_budget: int | str | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> None:
    """Measure every document into `shards`, and join these to `target`/<table>.parquet for each table of the part.

    Shards of this identity that are whole are kept; others are set aside and measured again, which `log` is told. `identity`
    goes into the metadata of every file. `memory_budget` bounds the memory beside the model's weights of all documents together;
    where it is small, fewer documents are measured side by side. Raises `OSError` where shards are damaged as they are written.
    """
    workers, budget = workers_for(model, len(corpus.documents)), None
    if memory_budget is not None:
        total = parse_bytes(memory_budget)
        workers = max(1, min(workers, total // _least_budget(model, corpus, spec)))
        budget = total // workers
    files = ShardFiles(shards, identity, TABLES[spec.part], log)
    lengths = corpus.lengths()
    units = [f"{index:06d}" for index in range(len(lengths))]

    def measure_documents(indices: list[int]) -> list[int]:
        tasks = [measure_document(model, corpus.documents[index], corpus.first, spec, budget) for index in indices]
        for index, tables in zip(indices, _together(tasks), strict=True):
            files.write(units[index], tables)
        return indices

    per_token = len(spec.layers) * model.cfg.experts_per_token * max(1, len(spec.orders))
    description = f"measuring, {spec.part}"
    for pending in missing_units(files, units):
        done = sum(lengths) - sum(lengths[index] for index in pending)
        with progress_bar(sum(lengths), description, "tok", shown=progress, done=done, smoothing=0.1) as bar:
            for indices in in_parallel(measure_documents, _groups(model, lengths, spec, pending), workers):
                bar.update(sum(lengths[index] for index in indices))
                rate = bar.format_dict["rate"]
                if rate and spec.positions is None:
                    bar.set_postfix_str(f"{rate * per_token:,.0f} removals/s", refresh=False)
    for name, schema in TABLES[spec.part].items():
        _merge(files, units, name, schema.with_metadata(identity), target / f"{name}.parquet")


def missing_units(files: ShardFiles, units: Sequence[str]) -> Iterator[list[int]]:
    """Which units are to be measured, by number, until all are whole: what was measured is checked before it is used.

    Raises `OSError` where shards are damaged that were written a moment ago.
    """
    for _ in range(ATTEMPTS):
        pending = [number for number, unit in enumerate(units) if not files.is_whole(unit)]
        if not pending:
            return
        yield pending
    pending = [number for number, unit in enumerate(units) if not files.is_whole(unit)]
    if pending:
        raise OSError(
            f"{files.directory}: the shards of {', '.join(units[number] for number in pending[:5])} are damaged although they "
            f"were written {ATTEMPTS} times: check the disk, or give another directory for results"
        )


def _groups(model: Transformer, lengths: list[int], spec: PartSpec, pending: list[int]) -> list[list[int]]:
    """Documents to measure together: one, where weights are in memory. Where they are streamed, as many as fit on half of the
    free disk while they wait between layers, so that each weight is read once for all of them.
    """
    spill = spill_of(model)
    if spill is None:
        return [[index] for index in pending]
    each = model.cfg.experts_per_token if spec.part != "sequence" else max(map(model.cfg.experts_in, spec.layers))
    per_token = len(spec.layers) * each * variant_bytes(model.cfg)
    room = shutil.disk_usage(spill_directory(spill.directory)).free // 2
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


def _together(tasks: list[Steps[Result]]) -> list[Result]:
    """What each of several measurements returns, run side by side through the layers."""
    results: list[Result | None] = [None] * len(tasks)

    def keep(number: int, task: Steps[Result]) -> Steps[None]:
        results[number] = yield from task

    run_without_grad(side_by_side([keep(number, task) for number, task in enumerate(tasks)]))
    return cast(list[Result], results)


def in_parallel(measure: Callable[[list[int]], list[int]], groups: list[list[int]], workers: int) -> Iterator[list[int]]:
    """Call `measure` on each group and yield what it returns, as each is done. An exception in one stops the others.

    On a CPU, documents side by side use the cores better than one document on all of them, whose operations are small and
    would wait for each other's threads; the cores are shared out among a few workers.
    """
    cores = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),))
    try:
        for done in as_completed([executor.submit(measure, group) for group in groups]):
            yield done.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def workers_for(model: Transformer, documents: int) -> int:
    """How many groups to measure at once, from the number of all documents, measured before or not.

    From the number of workers follows that of each one's threads, on which the last bits of products depend; so a resumed run has
    the same. Of streamed weights one layer is in memory, so all groups go through it together.
    """
    alone = model.cfg.device.type != "cpu" or model.streams
    return 1 if alone else max(1, min(torch.get_num_threads(), documents, MAX_WORKERS))


def _least_budget(model: Transformer, corpus: TokenizedCorpus, spec: PartSpec) -> int:
    """The bytes that one document takes at least."""
    length = min(corpus.n_ctx, max(corpus.lengths()) + 1)  # a BOS token is no document's own
    least = demand_of(model.cfg, length, chunk_size=length).of_one_query(model.cfg.experts_per_token)
    return max(least, least_budget_of_gradients(model.cfg, length)) if spec.first_order else least


def _merge(files: ShardFiles, units: Sequence[str], name: str, schema: pa.Schema, target: Path) -> None:
    """Join the shards of a table in order, one in memory at a time."""
    with (
        atomic_path(target) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for unit in units:
            writer.write_table(files.read(unit, name).cast(schema))
