"""One part of a measurement, document by document into files.

Each document is measured on its own, into a shard of each table (`shard_files`), by whatever executor there is. A run that was
killed resumes with the first document that has none, and ends with the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from hooked_moe.corpus import Window
from hooked_moe.counterfactuals.engine.memory import demand_of, parse_bytes, variant_bytes
from hooked_moe.counterfactuals.engine.requests import checked_products
from hooked_moe.counterfactuals.engine.steps import run_without_grad, side_by_side
from hooked_moe.counterfactuals.first_order import least_budget as least_budget_of_gradients
from hooked_moe.counterfactuals.first_order import waiting_bytes as gradient_waiting_bytes
from hooked_moe.executors import Executor, ModelWork, Threads, await_arrival
from hooked_moe.loading.fingerprint import SameModel, computed_on
from hooked_moe.loading.spill import spill_directory
from hooked_moe.loading.streaming import spill_of
from hooked_moe.measurement.document_tables import TABLES, measure_document
from hooked_moe.measurement.part_spec import BUDGETED_PARTS, PartSpec
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.shard_transfer import ShardTransfer
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.progress import progress_bar
from hooked_moe.tables.files import atomic_path, parquet_writer
from hooked_moe.transformer import Transformer

MAX_WORKERS = 4
"""The most documents measured side by side: where no budget is given, each has `requests.WAITING_BYTES` of its own."""
ATTEMPTS = 2
"""How often a document is measured in one run whose shards are damaged."""

Log = Callable[[str], object]


@dataclass(frozen=True)
class MeasureDocuments:
    """What is measured of every document, and where its shards go: a task for executors, whose units are groups of documents."""

    documents: Sequence[list[Window]]
    first: int
    """Where a window's own tokens begin."""
    spec: PartSpec
    budget: int | None
    """Bytes beside the weights, for each unit."""
    shards: Path
    identity: dict[str, str]
    transfer: ShardTransfer | None = None
    """How shards get to `shards` from where they are measured; None: they are written there."""

    def do(self, resource: Transformer, unit: Sequence[int]) -> None:
        """Measure the documents of these numbers whose shards a worker has not left that died before it could say so."""
        there = self.files(self.shards)
        unit = [index for index in unit if self.transfer is not None or not there.is_whole(unit_name(index))]
        tasks = [measure_document(resource, self.documents[index], self.first, self.spec, self.budget) for index in unit]
        for index, tables in zip(unit, run_without_grad(side_by_side(tasks)), strict=True):
            self._write(unit_name(index), tables, computed_on(resource.cfg.device))

    def _write(self, unit: str, tables: dict[str, pa.Table], place: str) -> None:
        if self.transfer is None:
            self.files(self.shards).write(unit, tables, computed_on=place)
            return
        with tempfile.TemporaryDirectory(prefix="hooked_moe_") as directory:
            files = self.files(Path(directory))
            files.write(unit, tables, computed_on=place)
            self.transfer.put(Path(directory), files.names_of(unit))

    def files(self, directory: Path, log: Log = lambda line: None) -> ShardFiles:
        """The shards of the part in a directory. `log` is told which are damaged."""
        return ShardFiles(directory, self.identity, TABLES[self.spec.part], log)


class PartMeasurement:
    """One part of a measurement in units: which are pending, one of them measured, and all of them merged."""

    def __init__(
        self,
        model: Transformer,
        corpus: TokenizedCorpus,
        spec: PartSpec,
        shards: Path,
        identity: dict[str, str],
        *,
        share: Share | None = None,
        memory_budget: int | str | None = None,
        plan: dict[str, Any] | None = None,
        transfer: ShardTransfer | None = None,
        log: Log = lambda line: None,
    ) -> None:
        """`identity` goes into the metadata of every file. Of a `share`, no other documents are measured. `memory_budget` bounds
        the memory beside the model's weights of all documents together; where it is small, fewer are measured side by side.
        `plan` says what model workers in other processes must have loaded. With a `transfer`, shards come by way of that.
        """
        workers, budget = workers_for(model, len(corpus.documents)), None
        if memory_budget is not None:
            total = parse_bytes(memory_budget)
            workers = max(1, min(workers, total // _least_budget(model, corpus, spec)))
            budget = total // workers
        self.lengths = corpus.lengths()
        task = MeasureDocuments(corpus.documents, corpus.first, spec, budget, shards.resolve(), identity, transfer)
        check = None if plan is None else SameModel(plan)
        self.work: ModelWork[Sequence[int]] = ModelWork(model, task, workers, check)
        self.spec = spec
        self.numbers = [n for n in range(len(self.lengths)) if share is None or n in share]
        self._files, self._transfer = task.files(task.shards, log), transfer

    def pending(self) -> Iterator[list[int]]:
        """Which documents are to be measured, until all have whole shards: see `missing_units`."""
        self._fetch()
        for missing in missing_units(self._files, [unit_name(number) for number in self.numbers]):
            yield [self.numbers[index] for index in missing]

    def groups(self, pending: Sequence[int], places: int) -> list[list[int]]:
        """Documents to measure together, as one unit of an executor: one, where weights are in memory.

        Where they are streamed, each weight is read once for a whole group: there are as many groups as places, or more, so that
        what waits between layers fits on half of the free disk.
        """
        model, spec = self.work.model, self.spec
        spill = spill_of(model)
        if spill is None:
            return [[index] for index in pending]
        waiting = {index: _waiting_bytes(model, spec, index, self.lengths[index]) for index in pending}
        room = shutil.disk_usage(spill_directory(spill.directory)).free // 2
        share = sum(waiting.values()) / places
        groups: list[list[int]] = []
        used = room
        for index in pending:
            needed = waiting[index]
            if used >= share or used + needed > room:
                groups.append([])
                used = 0
            groups[-1].append(index)
            used += needed
        return groups

    def measure(self, group: Sequence[int]) -> None:
        """Measure these documents here, into their shards."""
        self.work.do(group)

    def await_shards(self, group: Sequence[int]) -> None:
        """Wait until the shards of measured documents can be seen here, which network file systems take a while for.

        Raises `OSError` where that does not come about.
        """

        def arrived() -> bool:
            self._fetch()
            return all(self._files.has_record(unit_name(index)) for index in group)

        await_arrival(
            arrived,
            f"a worker has measured documents {list(group)}, but their shards are not in {self._files.directory}: all workers "
            "must see the run's directory at this path",
        )

    def _fetch(self) -> None:
        if self._transfer is not None:
            self._transfer.fetch(self._files.directory)

    def merge(self, target: Path) -> dict[str, int]:
        """Join the shards of all documents to `target`/<table>.parquet for each table of the part.

        Returns how many documents were measured on what, as `computed_on` says it.
        """
        identity, units = self._files.identity, list(map(unit_name, range(len(self.lengths))))
        for name, schema in TABLES[self.spec.part].items():
            _merge(self._files, units, name, schema.with_metadata(identity), target / f"{name}.parquet")
        return dict(sorted(Counter(self._files.note(unit, "computed_on") for unit in units).items()))


def measure_part(
    model: Transformer,
    corpus: TokenizedCorpus,
    spec: PartSpec,
    shards: Path,
    target: Path,
    identity: dict[str, str],
    *,
    executor: Executor | None = None,
    share: Share | None = None,
    memory_budget: int | str | None = None,
    plan: dict[str, Any] | None = None,
    transfer: ShardTransfer | None = None,
    progress: bool = True,
    log: Log = lambda line: None,
) -> dict[str, int]:
    """Measure every document into `shards`, and join these to `target`/<table>.parquet for each table of the part.

    Shards of this identity that are whole are kept; others are set aside and measured again, which `log` is told. The
    `executor` says where documents are measured (None: in threads of this process). Of a `share`, only its documents are
    measured, and nothing is joined. Returns what `merge` does; nothing for a share. Raises `OSError` where shards are damaged as
    they are written. See `PartMeasurement`.
    """
    executor = executor or Threads()
    part = PartMeasurement(
        model, corpus, spec, shards, identity, share=share, memory_budget=memory_budget, plan=plan, transfer=transfer, log=log
    )
    per_token = len(spec.layers) * model.cfg.experts_per_token * max(1, len(spec.orders))
    total, description = sum(part.lengths[number] for number in part.numbers), f"measuring, {spec.part}"
    for pending in part.pending():
        groups = part.groups(pending, executor.places(part.work))
        done = total - sum(part.lengths[index] for index in pending)
        with progress_bar(total, description, "tok", shown=progress, done=done, smoothing=0.1) as bar:
            for group in executor.run(part.work, groups):
                part.await_shards(group)
                bar.update(sum(part.lengths[index] for index in group))
                rate = bar.format_dict["rate"]
                if rate and spec.positions is None and spec.part not in BUDGETED_PARTS:
                    bar.set_postfix_str(f"{rate * per_token:,.0f} removals/s", refresh=False)
    if share is not None:
        return {}
    places = part.merge(target)
    if len(places) > 1:
        listed = " and on ".join(f"{place} ({n} of them)" for place, n in places.items())
        log(f"note: documents were measured on {listed}: the last bits of a number depend on that")
    return places


def unit_name(document: int) -> str:
    """What the shards of a document are called."""
    return f"{document:06d}"


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


def _waiting_bytes(model: Transformer, spec: PartSpec, document: int, length: int) -> int:
    """What a document of this length keeps between layers while others take their turn."""
    cfg = model.cfg
    if spec.part == "estimates":
        return length * gradient_waiting_bytes(cfg)
    if spec.draw is not None:
        picks = spec.draw.picks.get(document)
        return (length + (0 if picks is None else len(picks.position))) * variant_bytes(cfg)
    each = cfg.experts_per_token if spec.part != "sequence" else max(map(cfg.experts_in, spec.layers))
    beside = gradient_waiting_bytes(cfg) if spec.part == "position" else 0
    return length * (len(spec.layers) * each * variant_bytes(cfg) + beside)


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
    products = checked_products(model, spec.products)
    least = demand_of(model.cfg, length, chunk_size=length, products=products).of_one_query(model.cfg.experts_per_token)
    return max(least, least_budget_of_gradients(model.cfg, length)) if spec.part == "position" else least


def require_room(model: Transformer, corpus: TokenizedCorpus, spec: PartSpec, budget: int) -> None:
    """Raises `ValueError` where a memory budget has no room for one document, which would show after verification only."""
    if spec.part == "position" and budget < (least := _least_budget(model, corpus, spec)):
        raise ValueError(f"memory_budget (--memory) is {budget:,} bytes, and the longest document takes {least:,} at least")


def _merge(files: ShardFiles, units: Sequence[str], name: str, schema: pa.Schema, target: Path) -> None:
    """Join the shards of a table in order, one in memory at a time."""
    with atomic_path(target) as temporary, parquet_writer(schema, temporary) as writer:
        for unit in units:
            writer.write_table(files.read(unit, name).cast(schema))
