"""A measurement: the effect tables of a model on a corpus, in one directory, measured when they are asked for.

    with open_measurement(model, TokenizedCorpus(model, corpus, n_ctx=512)) as run:
        run.require("position")                              # every expert removed at every token
        run.require("sequence", positions=sample)
        run.require("progressive", orders=["descending", "random"], positions=sample)

A part is measured once, and its tables are used from then on; a run that was killed resumes where it stopped and ends with the
same bytes. `plan.json` says what is measured (model, corpus, layers, kind of removal, versions), and a directory holds the
results of one plan only; `manifest.json` says how much has been measured, and what verification found. Analysis is elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from hooked_moe.checks import WrongTypeError, whole_numbers
from hooked_moe.counterfactuals import Order
from hooked_moe.counterfactuals.engine.memory import parse_bytes
from hooked_moe.counterfactuals.engine.requests import checked_products
from hooked_moe.counterfactuals.observations import most_experts
from hooked_moe.executors import Executor
from hooked_moe.expert_mask import RemovalName, check_removal
from hooked_moe.measurement.budget import Budget, share_of
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.draw import Draw, draw_removals
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.gate import first_reading, verify_once
from hooked_moe.measurement.locks import Lock
from hooked_moe.measurement.manifest import Manifest
from hooked_moe.measurement.part_request import PartRequest, sampled_spec, with_measured
from hooked_moe.measurement.part_spec import SCOPES, Part, PartSpec, ProductsName, record_fault
from hooked_moe.measurement.plan import measurement_plan
from hooked_moe.measurement.run_directory import claim, claim_share, results_directory
from hooked_moe.measurement.run_tables import BESIDE, RunTables, tables_of
from hooked_moe.measurement.shard_files import remove_shards_of_part
from hooked_moe.measurement.shard_transfer import ShardTransfer
from hooked_moe.measurement.shards import measure_part, require_room
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import Clean
from hooked_moe.tables import REMOVAL_ORDERS, FileRecords, digest
from hooked_moe.transformer import Transformer


def open_measurement(
    model: Transformer,
    tokenized: TokenizedCorpus,
    layers: Iterable[int] | None = None,
    removal: RemovalName = "zero",
    *,
    results: str | os.PathLike[str] = Path("results"),
    name: str | None = None,
    share: Share | None = None,
    executor: Executor | None = None,
    object_store: str | None = None,
    budget: Budget | None = None,
    products: ProductsName | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> Run:
    """The run of this measurement under `results`/<model>/, new or to be continued; nothing is measured yet.

    `layers` None means all that have experts. The `name` of the run's directory is made of the corpus and the plan where none is
    given, so that the same measurement finds its directory again. `log` is called with the lines that report on verification,
    such as `print`. A run with a `budget` makes a sample of the removals (`Run.require_sample`), and nothing else.
    `products` are those of removals at single tokens, as in `expert_effects`; all else has the model's own.

    `executor` says where documents are measured; None: in threads of this process. With a `share`, every `require` measures the
    documents of that share alone, beside other processes that measure theirs, and makes no tables: a run without a share finds
    what all have measured, and makes the tables of it. `object_store` is a place such as "s3://bucket/prefix", by
    way of which what is measured elsewhere comes here; None: all processes see this directory.

    Raises `ValueError` for layers without experts and for a directory that was begun with another plan, `BlockingIOError` while
    another process writes there, `OSError` where the directory cannot be made.
    """
    check_removal(removal)
    checked_products(model, products)
    if not isinstance(tokenized, TokenizedCorpus):
        raise WrongTypeError(f"expected a TokenizedCorpus(model, corpus, n_ctx), not {type(tokenized).__name__}")
    layers = tuple(model.cfg.moe_layers if layers is None else sorted(set(whole_numbers(layers, "layers", model.cfg.n_layers))))
    without = [layer for layer in layers if layer not in model.cfg.moe_layers]
    if without or not layers:
        raise ValueError(f"layers {without or '()'} have no experts to remove; layers {model.cfg.moe_layers} have")
    weights_sha256, clean = first_reading(model, tokenized)
    plan = measurement_plan(model, tokenized, layers, removal, budget, products, weights_sha256)
    name = name or f"{Path(tokenized.corpus.name).stem}-{digest(plan)[:8]}"
    directory = results_directory(results) / Path(plan["model"]["name"]).name / name
    lock = claim(directory, plan) if share is None else claim_share(directory, plan, share, log)
    rest = (share, executor, object_store, budget, products, clean)
    return Run(directory, model, tokenized, layers, removal, plan, lock, log, *rest)


class Run:
    """One measurement, open for writing: no other process can open it until `close`, or the end of a `with` block.

    A run of a share can be open in several processes, each with another share.
    """

    def __init__(
        self,
        directory: Path,
        model: Transformer,
        tokenized: TokenizedCorpus,
        layers: tuple[int, ...],
        removal: RemovalName,
        plan: dict[str, Any],
        lock: Lock,
        log: Callable[[str], object],
        share: Share | None = None,
        executor: Executor | None = None,
        object_store: str | None = None,
        budget: Budget | None = None,
        products: ProductsName | None = None,
        clean: Clean | None = None,
    ) -> None:
        self.directory = directory
        self.model = model
        self.tokenized = tokenized
        self.layers = layers
        self.removal: RemovalName = removal
        self.plan = plan
        self.share = share
        self.executor = executor
        self._object_store = object_store
        self.budget = budget
        self.products: ProductsName | None = products
        self._clean = clean
        self._draw: Draw | None = None
        self._tables = RunTables(directory, model, tokenized, layers)
        self._lock = lock
        self._log = log
        try:
            self._manifest = Manifest(directory, plan, record_fault)
            tables: dict[str, list[str]] = {part: tables_of(part) for part in TABLES}
            self._damaged = self._manifest.damaged_files(tables, log, leave=share is not None)
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says, or will say: the plan, what has been measured, verification, checksums."""
        return self._manifest.values

    def known_files(self) -> FileRecords:
        """Checksums of measured tables that need not be read again: they were compared with the files, or have just been made."""
        return {name: record for name, record in self.manifest["files"].items() if name not in self._damaged}

    def has(self, part: Part) -> bool:
        """Whether a part has been measured, of whatever positions, and its tables are as they were written."""
        if part not in self._manifest.parts or not self._damaged.isdisjoint(tables_of(part)):
            return False
        if self.share is None:
            self._restore_tables_of_the_run(part)
        return True

    def require(
        self,
        part: Part,
        positions: Iterable[tuple[int, int]] | None = None,
        *,
        layers: Iterable[int] | None = None,
        orders: Iterable[Order] = REMOVAL_ORDERS,
        seed: int = 0,
        progress: bool = True,
        memory_budget: int | str | None = None,
        executor: Executor | None = None,
    ) -> None:
        """Measure a part, unless it has been measured already. In a run of a share: measure its documents of the part.

        "position" removes every active expert at one token at a time (effects, tokens, routing, expert_weights); "sequence" at
        every token of the sequence (effects_sequence); "progressive" removes more and more of them at one token (progressive).
        `positions` are (document, position) pairs; None means all. `layers`, `orders` and the `seed` of the random order apply
        to "progressive" alone; its layers must be among the run's. Earlier measurements stay: a part that lacks some of what is
        asked is measured again, for all that was ever asked of it.

        Raises `ValueError` for positions without a next token, for another seed than before, and if verification fails: then
        nothing is measured. `memory_budget` bounds the memory beside the model's weights. `executor` takes the place of the run's
        own.
        """
        spec = self._spec(PartRequest(part, positions, layers, orders, seed))
        if memory_budget is not None:
            require_room(self.model, self.tokenized, spec, parse_bytes(memory_budget))
        if self._is_measured(spec):
            if self.share is None:
                remove_shards_of_part(self.directory / "shards", part)
            return
        spec = self._with_measured(spec)
        wanted = self.share is None and self._tables.have_weights(part)
        weights = [expert_weights.steps(self.model, self.layers)] if wanted else []
        of_run = (self.manifest, self.model, self.tokenized, self.removal, SCOPES[part], self._log)
        tables = verify_once(*of_run, weights, self.products, self.budget is not None, self._clean)
        identity = {"plan": digest(self.plan), "part": digest(spec.as_json())}
        if self.share is None:
            self._tables.write(part, self._drawn, *tables)
        name = f"{part}-{identity['part'][:8]}"
        transfer = None
        if self._object_store is not None:
            transfer = ShardTransfer.below(self._object_store, f"{self.directory.name}-{identity['plan'][:8]}", name)
        places = measure_part(
            self.model,
            self.tokenized,
            spec,
            self.directory / "shards" / name,
            self.directory,
            identity,
            executor=executor or self.executor,
            share=self.share,
            memory_budget=memory_budget,
            plan=self.plan,
            transfer=transfer,
            progress=progress,
            log=self._log,
        )
        if self.share is not None:
            return
        self._manifest.parts[part] = spec.as_json()
        self.manifest["computed_on"] = self.manifest.get("computed_on", {}) | {part: places}
        written = [*tables_of(part), *BESIDE[part]]
        self._manifest.write(written)
        self._damaged.difference_update(written)
        remove_shards_of_part(self.directory / "shards", part)
        if transfer is not None:
            transfer.clear()

    def require_sample(self, *, progress: bool = True, memory_budget: int | str | None = None) -> Draw:
        """Measure a budgeted run: the estimates of all removals, then those that are drawn from them. Returns what was drawn.

        A budget in seconds is turned into a share once, by a short timing before anything else, which the manifest records: a run
        that is resumed, or opened again, draws the same. Raises `ValueError` in a run without a budget or of a share, and where
        the seconds are too few.
        """
        if self.share is not None:
            raise ValueError(
                "a sample is drawn from the estimates of all documents, which a share does not have: leave the share out"
            )
        PartRequest("estimates").check_part(self.budget is not None)
        self._share_of_removals()
        self.require("estimates", progress=progress, memory_budget=memory_budget)
        self.require("sampled", progress=progress, memory_budget=memory_budget)
        return self._drawn()

    def _drawn(self) -> Draw:
        """The removals to make, from the estimates."""
        if not self.has("estimates"):
            raise ValueError("a sample is drawn from the estimates of all removals: measure the part 'estimates' first")
        if self._draw is None:
            assert self.budget is not None
            share, estimates = self._share_of_removals(), self.directory / "estimates.parquet"
            self._draw = draw_removals(estimates, most_experts(self.model), share, self.budget.seed)
        return self._draw

    def _share_of_removals(self) -> float:
        """What the budget pays for, by the manifest, or by a timing that the manifest is told."""
        assert self.budget is not None
        if "budget" not in self.manifest:
            self.manifest["budget"] = share_of(self.budget, self.model, self.tokenized, self.layers, self.removal, self.products)
            self._manifest.write([])
        return float(self.manifest["budget"]["share"])

    def _spec(self, request: PartRequest) -> PartSpec:
        """What is asked, checked."""
        request.check_part(self.budget is not None)
        if request.part == "sampled":
            return sampled_spec(self._drawn(), self.layers, self.removal, self.products)
        return request.spec(self.tokenized, self.layers, self.removal, self.model.cfg.n_layers, self.products)

    def _with_measured(self, spec: PartSpec) -> PartSpec:
        """What is asked of the part together with what it has already."""
        return with_measured(spec, self._manifest.parts.get(spec.part), self.directory, self.tokenized, self._log)

    def _is_measured(self, spec: PartSpec) -> bool:
        """Whether the part has all that is asked of it."""
        return self.has(spec.part) and self._with_measured(spec).as_json() == self._manifest.parts[spec.part]

    def _restore_tables_of_the_run(self, part: Part) -> None:
        """Write them again, where one is lost, or of a later version than the run."""
        names = set(BESIDE[part])
        lost = (names & self._damaged) | (names - self.manifest["files"].keys())
        if lost:
            self._tables.write(part, self._drawn)
            self._manifest.write(BESIDE[part])
            self._damaged -= lost
