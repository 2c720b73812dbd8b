"""The exhaustive effect table of a corpus, measured document by document into files.

Each document is a unit of work of its own: (model, layers, document) -> two parquet shards, written atomically. A run that
is killed goes on with the first document that has no shard, and ends with the same bytes. Nothing here knows of analysis.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool
from tqdm import tqdm

from hooked_moe.corpus import Corpus, Window, tokenize_documents
from hooked_moe.counterfactuals import Scope, expert_effects_steps, expert_observations_steps
from hooked_moe.effects import ExpertEffects
from hooked_moe.expert_mask import Removal
from hooked_moe.fan_out import Steps, side_by_side
from hooked_moe.memory import parse_bytes, variant_bytes
from hooked_moe.model import HookedMoE
from hooked_moe.requests import complete
from hooked_moe.tables import DOCUMENTS, EFFECTS, EFFECTS_SEQUENCE, TOKENS, atomic_path, write_parquet_atomic

WINDOWS_AT_ONCE = 4
MAX_WORKERS = 4
"""Documents measured side by side, at most: where no budget is given, each has `requests.WAITING_BYTES` of its own."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    layers: tuple[int, ...]
    scopes: tuple[Scope, ...] = ("position",)
    removal: Removal = "zero"
    n_ctx: int = 512
    sample: frozenset[tuple[int, int]] | None = None
    """The (document, position) pairs to measure; None means every one. Routing is observed everywhere in any case."""


class TokenizedCorpus:
    """A corpus in windows of the model's context. The last token of a window is the first of the next, which predicts from it."""

    def __init__(self, model: HookedMoE, corpus: Corpus, n_ctx: int, limit: int | None = None) -> None:
        """`limit` keeps the first so many tokens of each document.

        Raises `ValueError` without a tokenizer, with one that the model has no embeddings for, or with empty documents.
        """
        if model.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot read a corpus: put its tokenizer.json beside its weights")
        encode = model.tokenizer.encode
        self.corpus = corpus
        windows = tokenize_documents(corpus.documents, lambda text: encode(text, prepend_bos=False)[:limit], n_ctx)
        highest = max(int(window.tokens.max()) for window in windows)
        if highest >= model.cfg.d_vocab:
            raise ValueError(
                f"the tokenizer gives token id {highest}, but {model.cfg.model_name} has ids 0 to {model.cfg.d_vocab - 1}: "
                "put the model's own tokenizer.json beside its weights"
            )
        by_document: dict[int, list[Window]] = defaultdict(list)
        for window in windows:
            by_document[window.document].append(window)
        self.documents = [by_document[index] for index in range(len(corpus.documents))]

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [windows[-1].start + len(windows[-1].tokens) for windows in self.documents]

    def sha256(self) -> str:
        """Of every window's document, start and tokens: the same text in another tokenizer's tokens is another corpus."""
        digest = hashlib.sha256()
        for window in (window for windows in self.documents for window in windows):
            digest.update(np.array([window.document, window.start, *window.tokens], dtype="<i8").tobytes())
        return digest.hexdigest()

    def valid_positions(self) -> list[tuple[int, int]]:
        """Every (document, position) that has a next token, in order."""
        return [(document, position) for document, length in enumerate(self.lengths()) for position in range(length - 1)]

    def table(self) -> pa.Table:
        """One row per document, as in `tables.DOCUMENTS`."""
        documents = self.corpus.documents
        columns = {
            "document": range(len(documents)),
            "id": [d.id for d in documents],
            "domain": [d.domain for d in documents],
            "title": [d.title for d in documents],
            "n_tokens": self.lengths(),
        }
        return pa.table(
            {name: pa.array(values, DOCUMENTS.field(name).type) for name, values in columns.items()}, schema=DOCUMENTS
        )


def measure(
    model: HookedMoE,
    corpus: TokenizedCorpus,
    plan: Plan,
    directory: Path,
    progress: bool = True,
    memory_budget: int | str | None = None,
) -> None:
    """Write documents.parquet, tokens.parquet, effects.parquet and, for scope "sequence", effects_sequence.parquet.

    Shards already in `directory`/shards are kept: the caller sees to it that they are of the same plan. `memory_budget` bounds
    the memory beside the model's weights, of all documents that are measured at once together.
    """
    workers = _workers(model, len(corpus.documents))
    budget = None if memory_budget is None else parse_bytes(memory_budget) // workers
    shards = directory / "shards"
    shards.mkdir(exist_ok=True)
    names = ["tokens", *(_table_name(scope) for scope in plan.scopes)]
    total = sum(corpus.lengths())
    per_token = len(plan.layers) * model.cfg.experts_per_token
    paths = [{name: shards / f"{index:06d}.{name}.parquet" for name in names} for index in range(len(corpus.documents))]

    pending = [index for index in range(len(paths)) if not all(path.exists() for path in paths[index].values())]

    def measure_documents(indices: list[int]) -> list[int]:
        works = [_measure_document(model, corpus.documents[index], plan, budget) for index in indices]
        for index, tables in zip(indices, _together(works), strict=True):
            for name, table in tables.items():
                write_parquet_atomic(table, paths[index][name])
        return indices

    with tqdm(total=total, unit="tok", desc="measuring", disable=not progress, smoothing=0.1) as bar:
        bar.update(total - sum(corpus.lengths()[index] for index in pending))
        for indices in _in_parallel(measure_documents, _groups(model, corpus, plan, pending), model):
            bar.update(sum(corpus.lengths()[index] for index in indices))
            rate = bar.format_dict["rate"]
            if rate and plan.sample is None:
                bar.set_postfix_str(f"{rate * per_token:,.0f} removals/s", refresh=False)
    write_parquet_atomic(corpus.table(), directory / "documents.parquet")
    for name in names:
        _merge([of_document[name] for of_document in paths], directory / f"{name}.parquet")


def _groups(model: HookedMoE, corpus: TokenizedCorpus, plan: Plan, pending: list[int]) -> list[list[int]]:
    """Documents to measure together: one, where weights are in memory. Where they are streamed, as many as fit on half of the
    free disk while they wait between layers, so that each weight is read once for all of them.
    """
    if model.spill is None:
        return [[index] for index in pending]
    per_token = len(plan.layers) * model.cfg.experts_per_token * variant_bytes(model.cfg)
    room = shutil.disk_usage(model.spill.directory or tempfile.gettempdir()).free // 2
    groups: list[list[int]] = []
    used = room
    for index in pending:
        needed = corpus.lengths()[index] * per_token
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


def _in_parallel(work: Callable[[list[int]], list[int]], groups: list[list[int]], model: HookedMoE) -> Iterator[list[int]]:
    """Run `work` on each group and yield what it returns as it is done. An exception in one stops the others.

    On a CPU, documents side by side use the cores better than one document on all of them, whose operations are small and
    would wait for each other's threads; the cores are shared out among a few workers.
    """
    cores = torch.get_num_threads()
    workers = _workers(model, len(groups))
    per_worker = max(1, cores // workers)
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(per_worker,))
    try:
        for done in as_completed([executor.submit(work, group) for group in groups]):
            yield done.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _workers(model: HookedMoE, groups: int) -> int:
    """How many groups are measured at once. Streamed weights are of one layer at a time, so all go through it together."""
    alone = model.cfg.device.type != "cpu" or model.spill is not None
    return 1 if alone else max(1, min(torch.get_num_threads(), groups, MAX_WORKERS))


def remove_shards(directory: Path) -> None:
    """Delete the shards of a finished run."""
    shards = directory / "shards"
    for path in sorted(shards.glob("*.parquet")):
        path.unlink()
    if shards.exists():
        shards.rmdir()


def _table_name(scope: Scope) -> str:
    return "effects" if scope == "position" else "effects_sequence"


def _measure_document(model: HookedMoE, windows: list[Window], plan: Plan, budget: int | None) -> Steps[dict[str, pa.Table]]:
    """Every table of one document, in the order of its positions."""
    tables: dict[str, list[tuple[int, pa.Table]]] = defaultdict(list)
    for numbers in _equal_lengths(windows):
        some = [windows[number] for number in numbers]
        tokens = torch.from_numpy(np.stack([window.tokens for window in some]))
        asked = _asked(some, plan)
        for scope in plan.scopes:
            if asked is not None and not asked.any():
                effects = yield from expert_observations_steps(model, tokens, plan.layers)
            else:
                effects = yield from expert_effects_steps(
                    model, tokens, plan.layers, scope, plan.removal, asked, memory_budget=budget
                )
            for row, number in enumerate(numbers):
                last = number == len(windows) - 1
                schema = EFFECTS if scope == "position" else EFFECTS_SEQUENCE
                tables[_table_name(scope)].append((number, _effect_rows(windows[number], effects, row, last, schema)))
        for row, number in enumerate(numbers):
            tables["tokens"].append((number, _token_rows(windows, number, effects.baseline_loss[row])))
    return {name: pa.concat_tables([part for _, part in sorted(parts, key=lambda p: p[0])]) for name, parts in tables.items()}


def _equal_lengths(windows: list[Window]) -> Iterator[list[int]]:
    """Windows that can share a batch without padding: by number, a few at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        by_length[len(window.tokens)].append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), WINDOWS_AT_ONCE):
            yield numbers[start : start + WINDOWS_AT_ONCE]


def _asked(windows: Sequence[Window], plan: Plan) -> Bool[torch.Tensor, "batch pos"] | None:
    """Which positions of these windows are in the sample. A window's last token is measured in the next one."""
    if plan.sample is None:
        return None
    rows = [[(w.document, w.start + j) in plan.sample and j + 1 < len(w.tokens) for j in range(len(w.tokens))] for w in windows]
    return torch.tensor(rows)


def _own_rows(window: Window, last: bool) -> int:
    """How many of a window's tokens it reports: all but the one that the next window begins with."""
    return len(window.tokens) if last else len(window.tokens) - 1


def _effect_rows(window: Window, effects: ExpertEffects, row: int, last: bool, schema: pa.Schema) -> pa.Table:
    """Rows (position, layer, slot) of one window."""
    n = _own_rows(window, last)
    n_layers, slots = len(effects.layers), effects.expert_index.shape[-1]
    shape = (n, n_layers, slots)

    def per_slot(name: str) -> np.ndarray:
        return getattr(effects, name)[:, row, :n].transpose(0, 1).cpu().numpy()

    values: dict[str, Any] = {
        "document": np.full(shape, window.document),
        "position": (window.start + np.arange(n))[:, None, None],
        "layer": np.asarray(effects.layers)[None, :, None],
        "slot": np.arange(slots)[None, None, :],
        "expert": per_slot("expert_index"),
        "routing_weight": per_slot("routing_weight"),
        "output_norm": per_slot("output_norm"),
        "gap_norm": per_slot("gap_norm"),
        "rest_cosine": per_slot("rest_cosine"),
        "baseline_loss": effects.baseline_loss[row, :n].cpu().numpy()[:, None, None],
        "delta_loss": per_slot("delta_loss"),
    }
    return _as_table({name: np.broadcast_to(values[name], shape).ravel() for name in schema.names}, schema)


def _token_rows(windows: list[Window], number: int, baseline: torch.Tensor) -> pa.Table:
    window, last = windows[number], number == len(windows) - 1
    n = _own_rows(window, last)
    targets = np.append(window.tokens[1:], -1)[:n]
    values = {
        "document": np.full(n, window.document),
        "position": window.start + np.arange(n),
        "window": np.full(n, number),
        "context_position": np.arange(n),
        "token": window.tokens[:n],
        "target": targets,
        "baseline_loss": baseline[:n].cpu().numpy(),
    }
    return _as_table(values, TOKENS)


def _as_table(values: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(values[f.name].astype(f.type.to_pandas_dtype()), f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _merge(shards: list[Path], target: Path) -> None:
    """Join shards in order, one in memory at a time."""
    schema = pq.read_schema(shards[0])
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for shard in shards:
            writer.write_table(pq.read_table(shard, use_threads=False))
