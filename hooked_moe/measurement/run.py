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

import dataclasses
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet as pq
import torch

from hooked_moe.checks import WrongTypeError, whole_number, whole_numbers
from hooked_moe.counterfactuals import Order, Scope
from hooked_moe.expert_mask import RemovalName, check_removal
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.part_spec import Part, PartSpec, checked_positions
from hooked_moe.measurement.plan import measurement_plan
from hooked_moe.measurement.run_directory import claim, digest, read_json
from hooked_moe.measurement.shards import measure_part, remove_shards
from hooked_moe.measurement.tokenized_corpus import DocumentPositions, TokenizedCorpus
from hooked_moe.measurement.verification import EXACTNESS, MINIMUM_TOKENS, Check, noise_floor, verify
from hooked_moe.tables import REMOVAL_ORDERS, write_json_atomic, write_parquet_atomic
from hooked_moe.transformer import Transformer

_SCOPES: dict[Part, Scope] = {"position": "position", "sequence": "sequence", "progressive": "position"}
_EFFECT_TABLES: dict[Part, str] = {"position": "effects", "sequence": "effects_sequence", "progressive": "progressive"}
"""The table of each part that has a row for every removal."""


def open_measurement(
    model: Transformer,
    tokenized: TokenizedCorpus,
    layers: Iterable[int] | None = None,
    removal: RemovalName = "zero",
    *,
    results: Path = Path("results"),
    name: str | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> Run:
    """The run of this measurement under `results`/<model>/, new or to be continued; nothing is measured yet.

    `layers` None means all that have experts. The `name` of the run's directory is made of the corpus and the plan where none is
    given, so that the same measurement finds its directory again. `log` is called with the lines that report on verification,
    such as `print`.

    Raises `ValueError` for layers without experts and for a directory that was begun with another plan, `BlockingIOError` while
    another process writes there, `OSError` where the directory cannot be made.
    """
    check_removal(removal)
    if not isinstance(tokenized, TokenizedCorpus):
        raise WrongTypeError(f"expected a TokenizedCorpus(model, corpus, n_ctx), not {type(tokenized).__name__}")
    layers = tuple(model.cfg.moe_layers if layers is None else sorted(set(whole_numbers(layers, "layers", model.cfg.n_layers))))
    without = [layer for layer in layers if layer not in model.cfg.moe_layers]
    if without or not layers:
        raise ValueError(f"layers {without or '()'} have no experts to remove; layers {model.cfg.moe_layers} have")
    plan = measurement_plan(model, tokenized, layers, removal)
    name = name or f"{Path(tokenized.corpus.name).stem}-{digest(plan)[:8]}"
    directory = results / Path(plan["model"]["name"]).name / name
    lock = claim(directory, plan)
    return Run(directory, model, tokenized, layers, removal, plan, lock, log)


class Run:
    """One measurement, open for writing: no other process can open it until `close`, or the end of a `with` block."""

    def __init__(
        self,
        directory: Path,
        model: Transformer,
        tokenized: TokenizedCorpus,
        layers: tuple[int, ...],
        removal: RemovalName,
        plan: dict[str, Any],
        lock: filelock.BaseFileLock,
        log: Callable[[str], object],
    ) -> None:
        self.directory = directory
        self.model = model
        self.tokenized = tokenized
        self.layers = layers
        self.removal: RemovalName = removal
        self.plan = plan
        self.manifest: dict[str, Any] = plan | {"parts": {}}
        self._lock = lock
        self._log = log
        if (directory / "manifest.json").exists():
            self.manifest = read_json(directory / "manifest.json")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

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
    ) -> None:
        """Measure a part, unless it has been measured already.

        "position" removes every active expert at one token at a time (effects, tokens, routing, expert_weights); "sequence" at
        every token of the sequence (effects_sequence); "progressive" removes more and more of them at one token (progressive).
        `positions` are (document, position) pairs; None means all. `layers`, `orders` and the `seed` of the random order apply
        to "progressive" alone; its layers must be among the run's. Earlier measurements stay: a part that lacks some of what is
        asked is measured again, for all that was ever asked of it.

        Raises `ValueError` for positions without a next token, for another seed than before, and if verification fails: then
        nothing is measured. First-order effects are a column of "position" where weights are in memory, and nan where they are
        streamed; a model in memory measures a part without them again, and only such a model can add to a part with them: a
        streamed one raises `ValueError`. `memory_budget` bounds the memory beside the model's weights.
        """
        spec = self._requested(part, positions, layers, orders, seed)
        if self._is_measured(spec):
            self._remove_shards(part)
            return
        spec = self._union_with_measured(spec)
        if spec.first_order and self.model.streams:
            raise ValueError(
                f"part {part!r} of {self.directory} has first-order effects, and to measure more of them takes all weights in "
                "memory: open the model without stream=True, or give another name to the run"
            )
        self._verify(_SCOPES[part])
        identity = {"plan": digest(self.plan), "part": digest(spec.as_json())}
        write_parquet_atomic(self.tokenized.table(), self.directory / "documents.parquet")
        if part == "position":
            write_parquet_atomic(expert_weights(self.model, self.layers), self.directory / "expert_weights.parquet")
        measure_part(
            self.model,
            self.tokenized,
            spec,
            self.directory / "shards" / f"{part}-{identity['part'][:8]}",
            self.directory,
            identity,
            progress=progress,
            memory_budget=memory_budget,
        )
        self.manifest["parts"] |= {part: spec.as_json()}
        write_json_atomic(self.manifest, self.directory / "manifest.json")
        self._remove_shards(part)

    def _requested(
        self,
        part: Part,
        positions: Iterable[tuple[int, int]] | None,
        layers: Iterable[int] | None,
        orders: Iterable[Order],
        seed: int,
    ) -> PartSpec:
        """The arguments of `require`, checked."""
        if part not in TABLES:
            raise ValueError(f"part must be one of {', '.join(map(repr, TABLES))}, not {part!r}")
        chosen = checked_positions(positions, self.tokenized)
        if part != "progressive":
            first_order = part == "position" and not self.model.streams
            return PartSpec(part, self.layers, self.removal, chosen, first_order=first_order)
        asked = tuple(orders)
        if not asked or not set(asked) <= set(REMOVAL_ORDERS):
            raise ValueError(f"orders must be some of {REMOVAL_ORDERS}, not {asked}")
        n_layers = self.model.cfg.n_layers
        measured_layers = self.layers if layers is None else tuple(sorted(set(whole_numbers(layers, "layers", n_layers))))
        outside = [layer for layer in measured_layers if layer not in self.layers]
        if outside or not measured_layers:
            raise ValueError(f"layers {outside} are not of this run, which measures {list(self.layers)}")
        seed = whole_number(seed, "seed")
        return PartSpec(part, measured_layers, self.removal, chosen, _in_order(asked), seed, first_order=False)

    def _is_measured(self, spec: PartSpec) -> bool:
        """Whether the part has all that is asked of it."""
        recorded = self.manifest["parts"].get(spec.part)
        return recorded is not None and self._union_with_measured(spec).as_json() == recorded

    def _union_with_measured(self, spec: PartSpec) -> PartSpec:
        """What is asked of the part together with what it has already. Raises `ValueError` for another seed than the part's."""
        recorded = self.manifest["parts"].get(spec.part)
        if recorded is None:
            return spec
        if recorded.get("seed", spec.seed) != spec.seed:
            raise ValueError(
                f"{self.directory} has random orders of seed {recorded['seed']}, not {spec.seed}: give another name to the run"
            )
        positions = spec.positions
        if recorded["positions"] == "all":
            positions = None
        elif positions is not None:
            positions |= measured_positions(self.directory / f"{_EFFECT_TABLES[spec.part]}.parquet")
        return dataclasses.replace(
            spec,
            positions=positions,
            layers=tuple(sorted({*spec.layers, *recorded["layers"]})),
            orders=_in_order((*spec.orders, *recorded.get("orders", ()))),
            first_order=spec.first_order or recorded.get("first_order", spec.part == "position"),
        )

    def _verify(self, scope: Scope) -> None:
        """Gate a measurement in this scope, once. Raises `ValueError` if a check fails."""
        known = [check["name"] for check in self.manifest.get("verification", [])]
        if EXACTNESS[scope] in known:
            return
        windows = sorted((window.tokens for windows in self.tokenized.documents for window in windows), key=len, reverse=True)
        if len(windows[0]) < MINIMUM_TOKENS:
            raise ValueError(
                f"the longest document of {self.tokenized.corpus.name!r} has {len(windows[0])} tokens, and verifying the model "
                f"takes {MINIMUM_TOKENS}: give a corpus with longer documents"
            )
        checks = verify(self.model, torch.from_numpy(windows[0][None]), self.removal, (scope,))
        checks = [check for check in checks if check.name not in known or not check.passed]
        for check in checks:
            self._log(_as_line(check))
        failed = [check.name for check in checks if not check.passed]
        if failed:
            raise ValueError(
                f"verification failed ({', '.join(failed)}); nothing was measured, because the effects could not be trusted"
            )
        self.manifest["verification"] = self.manifest.get("verification", []) + [dataclasses.asdict(check) for check in checks]
        if "noise_floor" not in self.manifest:
            length = min(len(windows[0]), 128)
            batch = np.stack([window[:length] for window in windows if len(window) >= length][:4])
            floor = noise_floor(self.model, torch.from_numpy(batch))
            self._log(f"  noise floor: {floor:.3g} nats\n")
            self.manifest["noise_floor"] = {"max_abs_nats": floor, "windows": len(batch), "tokens_per_window": length}

    def _remove_shards(self, part: Part) -> None:
        shards = self.directory / "shards"
        for directory in sorted(shards.glob(f"{part}-*")):
            remove_shards(directory)
        if shards.exists() and not any(shards.iterdir()):
            shards.rmdir()


def measured_positions(effects: Path) -> DocumentPositions:
    """The (document, position) pairs whose removals an effect table has."""
    positions: set[tuple[int, int]] = set()
    columns = ["document", "position", "delta_loss"]
    for batch in pq.ParquetFile(effects).iter_batches(batch_size=1 << 18, columns=columns, use_threads=False):
        measured = ~np.isnan(batch["delta_loss"].to_numpy(zero_copy_only=False))
        pairs = (batch[name].to_numpy()[measured] for name in ("document", "position"))
        positions.update(map(tuple, np.unique(np.stack(list(pairs), axis=1), axis=0).tolist()))
    return frozenset(positions)


def _in_order(orders: Collection[Order]) -> tuple[Order, ...]:
    """Some orders of removal, each once, in the sequence of `REMOVAL_ORDERS`."""
    return tuple(order for order in REMOVAL_ORDERS if order in orders)


def _as_line(check: Check) -> str:
    verdict = "pass" if check.passed else "FAIL"
    return f"  {verdict}  {check.name}: {check.value:.3g} (threshold {check.threshold:.3g}) - {check.detail}"
