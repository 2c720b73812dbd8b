"""A measurement: the effect tables of a model on a corpus, in one directory, measured when they are asked for.

    with open_measurement(model, TokenizedCorpus(model, corpus, n_ctx=512)) as run:
        run.require("position")                              # every expert removed at every token
        run.require("sequence", positions=sample)
        run.require("progressive", orders=["descending", "random"], positions=sample)

A part is measured once, and what it left is used from then on; a run that was killed goes on where it stopped, to the same bytes.
`plan.json` says what is measured (model, corpus, layers, kind of removal, versions), and a directory holds nothing else;
`manifest.json` says how much of it there is, and what verification found. Nothing here knows of analysis.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet as pq
import torch

from hooked_moe.counterfactuals import Order, Scope
from hooked_moe.expert_mask import RemovalName, check_removal
from hooked_moe.measurement.document_tables import TABLES, Part, Wanted
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.fingerprint import config_values, versions, weights_sha256
from hooked_moe.measurement.run_directory import claim, digest, read_json
from hooked_moe.measurement.shards import measure_part, remove_shards
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import EXACTNESS, MINIMUM_TOKENS, noise_floor, verify
from hooked_moe.measurement.window_rows import Positions
from hooked_moe.tables import write_json_atomic, write_parquet_atomic
from hooked_moe.transformer import Transformer

ORDERS: tuple[Order, ...] = ("descending", "ascending", "random")
_SCOPES: dict[Part, Scope] = {"position": "position", "sequence": "sequence", "progressive": "position"}


def open_measurement(
    model: Transformer,
    tokenized: TokenizedCorpus,
    layers: Sequence[int] | None = None,
    removal: RemovalName = "zero",
    *,
    results: Path = Path("results"),
    name: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Run:
    """The run of this measurement under `results`/<model>/, new or to be continued; nothing is measured yet.

    `layers` None means all that have experts. The `name` of the run's directory is made of the corpus and the plan where none is
    given, so that the same measurement finds its directory again. `say` gets lines for people, as verification goes along.

    Raises `ValueError` for layers without experts and for a directory that was begun with another plan, `BlockingIOError` while
    another process writes there, `OSError` where the directory cannot be made.
    """
    check_removal(removal)
    layers = tuple(model.cfg.moe_layers if layers is None else sorted(set(layers)))
    without = [layer for layer in layers if layer not in model.cfg.moe_layers]
    if without or not layers:
        raise ValueError(f"layers {without or '()'} have no experts to remove; layers {model.cfg.moe_layers} have")
    plan = _describe(model, tokenized, layers, removal)
    name = name or f"{Path(tokenized.corpus.name).stem}-{digest(plan)[:8]}"
    directory = results / Path(plan["model"]["name"]).name / name
    lock = claim(directory, plan)
    return Run(directory, model, tokenized, layers, removal, plan, lock, say)


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
        say: Callable[[str], object],
    ) -> None:
        self.directory = directory
        self.model = model
        self.tokenized = tokenized
        self.layers = layers
        self.removal: RemovalName = removal
        self.plan = plan
        self.manifest: dict[str, Any] = plan | {"parts": {}}
        self._lock = lock
        self._say = say
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
        positions: Collection[tuple[int, int]] | None = None,
        *,
        layers: Sequence[int] | None = None,
        orders: Sequence[Order] = ORDERS,
        seed: int = 0,
        progress: bool = True,
        memory_budget: int | str | None = None,
    ) -> None:
        """Measure a part, unless it is there already.

        "position" removes every active expert at one token at a time (effects, tokens, routing, expert_weights); "sequence" at
        every token of the sequence (effects_sequence); "progressive" removes more and more of them at one token (progressive).
        `positions` are (document, position) pairs; None means all. `layers`, `orders` and the `seed` of the random order are of
        "progressive" alone; its layers must be among the run's. What was measured before stays: a part that lacks some of what
        is asked is measured anew, for all that was ever asked of it.

        Raises `ValueError` for positions without a next token, for another seed than before, and if verification fails: then
        nothing is measured. First-order effects are a column of "position" where weights are in memory, and nan where they are
        streamed; a part without them is measured anew by a model in memory, and more of a part with them takes one: else
        `ValueError`. `memory_budget` bounds the memory beside the model's weights.
        """
        wanted = self._wanted(part, positions, layers, orders, seed)
        if self._measured(wanted):
            self._remove_shards(part)
            return
        wanted = self._with_measured(wanted)
        if wanted.first_order and self.model.streams:
            raise ValueError(
                f"part {part!r} of {self.directory} has first-order effects, and to measure more of them takes all weights in "
                "memory: open the model without stream=True, or give another name to the run"
            )
        self._verify(_SCOPES[part])
        identity = {"plan": digest(self.plan), "part": digest(_as_json(wanted))}
        write_parquet_atomic(self.tokenized.table(), self.directory / "documents.parquet")
        if part == "position":
            write_parquet_atomic(expert_weights(self.model, self.layers), self.directory / "expert_weights.parquet")
        measure_part(
            self.model,
            self.tokenized,
            wanted,
            self.directory / "shards" / f"{part}-{identity['part'][:8]}",
            self.directory,
            identity,
            progress=progress,
            memory_budget=memory_budget,
        )
        self._record({"parts": self.manifest["parts"] | {part: _as_json(wanted)}})
        self._remove_shards(part)

    def _wanted(
        self,
        part: Part,
        positions: Collection[tuple[int, int]] | None,
        layers: Sequence[int] | None,
        orders: Sequence[Order],
        seed: int,
    ) -> Wanted:
        if part not in TABLES:
            raise ValueError(f"part must be one of {', '.join(map(repr, TABLES))}, not {part!r}")
        chosen = None if positions is None else frozenset((int(document), int(pos)) for document, pos in positions)
        valid = self.tokenized.valid_positions()
        if chosen is not None:
            invalid = sorted(chosen.difference(valid))
            if not chosen:
                raise ValueError("no positions to measure: positions is empty; leave it out to measure all")
            if invalid:
                raise ValueError(
                    f"positions {invalid[:5]} have no next token to predict; there are {len(valid)} (document, position) pairs "
                    f"that do, such as {valid[0]}"
                )
            chosen = None if len(chosen) == len(valid) else chosen
        if part != "progressive":
            first_order = part == "position" and not self.model.streams
            return Wanted(part, self.layers, self.removal, chosen, first_order=first_order)
        unknown = sorted(set(orders) - set(ORDERS))
        if unknown or not orders:
            raise ValueError(f"orders must be some of {ORDERS}, not {tuple(orders)}")
        some = self.layers if layers is None else tuple(sorted(set(layers)))
        outside = [layer for layer in some if layer not in self.layers]
        if outside or not some:
            raise ValueError(f"layers {outside} are not of this run, which measures {list(self.layers)}")
        return Wanted(part, some, self.removal, chosen, tuple(order for order in ORDERS if order in orders), seed, False)

    def _measured(self, wanted: Wanted) -> bool:
        """Whether all of it is there."""
        return (
            wanted.part in self.manifest["parts"] and _as_json(self._with_measured(wanted)) == self.manifest["parts"][wanted.part]
        )

    def _with_measured(self, wanted: Wanted) -> Wanted:
        """What is wanted, and what the part has already. Raises `ValueError` for another seed than the part's."""
        found = self.manifest["parts"].get(wanted.part)
        if found is None:
            return wanted
        if found.get("seed", wanted.seed) != wanted.seed:
            raise ValueError(
                f"{self.directory} has random orders of seed {found['seed']}, not {wanted.seed}: give another name to the run"
            )
        positions = wanted.positions
        if found["positions"] == "all":
            positions = None
        elif positions is not None:
            positions |= measured_positions(self.directory / f"{_table_of_effects(wanted.part)}.parquet")
        return dataclasses.replace(
            wanted,
            positions=positions,
            layers=tuple(sorted({*wanted.layers, *found["layers"]})),
            orders=tuple(order for order in ORDERS if order in (*wanted.orders, *found.get("orders", ()))),
            first_order=wanted.first_order or found.get("first_order", wanted.part == "position"),
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
        length = min(len(windows[0]), 128)
        alike = [window[:length] for window in windows if len(window) >= length][:4]
        found = verify(self.model, torch.from_numpy(windows[0][None]), self.removal, (scope,))
        found = [one for one in found if one.name not in known or not one.passed]
        for one in found:
            verdict = "pass" if one.passed else "FAIL"
            self._say(f"  {verdict}  {one.name}: {one.value:.3g} (threshold {one.threshold:.3g}) - {one.detail}")
        failed = [one.name for one in found if not one.passed]
        if failed:
            raise ValueError(
                f"verification failed ({', '.join(failed)}); nothing was measured, for the effects could not be trusted"
            )
        self.manifest["verification"] = self.manifest.get("verification", []) + [dataclasses.asdict(one) for one in found]
        if "noise_floor" not in self.manifest:
            floor = noise_floor(self.model, torch.from_numpy(np.stack(alike)))
            self._say(f"  noise floor: {floor:.3g} nats\n")
            self.manifest["noise_floor"] = {"max_abs_nats": floor, "windows": len(alike), "tokens_per_window": length}

    def _record(self, found: dict[str, Any]) -> None:
        self.manifest |= found
        write_json_atomic(self.manifest, self.directory / "manifest.json")

    def _remove_shards(self, part: Part) -> None:
        shards = self.directory / "shards"
        for directory in sorted(shards.glob(f"{part}-*")):
            remove_shards(directory)
        if shards.exists() and not any(shards.iterdir()):
            shards.rmdir()


def measured_positions(effects: Path) -> Positions:
    """The (document, position) pairs whose removals an effect table has."""
    found: set[tuple[int, int]] = set()
    columns = ["document", "position", "delta_loss"]
    for batch in pq.ParquetFile(effects).iter_batches(batch_size=1 << 18, columns=columns, use_threads=False):
        measured = ~np.isnan(batch["delta_loss"].to_numpy(zero_copy_only=False))
        pairs = (batch[name].to_numpy()[measured] for name in ("document", "position"))
        found.update(map(tuple, np.unique(np.stack(list(pairs), axis=1), axis=0).tolist()))
    return frozenset(found)


def _describe(model: Transformer, tokenized: TokenizedCorpus, layers: tuple[int, ...], removal: RemovalName) -> dict[str, Any]:
    """What identifies a measurement: two with the same description give the same tables."""
    corpus = tokenized.corpus
    description = {
        "format": 2,
        "model": {
            "name": model.cfg.model_name,
            "revision": model.cfg.revision,
            "weights_sha256": weights_sha256(model),
            "config": config_values(model.cfg),
        },
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "documents": len(corpus.documents),
            "tokens": sum(tokenized.lengths()),
            "tokens_sha256": tokenized.sha256(),
        },
        "measurement": {
            "layers": list(layers),
            "removal": removal,
            "context": tokenized.n_ctx,
            "tokens_per_document": "all" if tokenized.limit is None else tokenized.limit,
            "bos": tokenized.bos,
        },
        "versions": versions(),
    }
    return json.loads(json.dumps(description))  # as it is read back


def _as_json(wanted: Wanted) -> dict[str, Any]:
    """How the manifest records a part."""
    positions = "all" if wanted.positions is None else len(wanted.positions)
    record: dict[str, Any] = {"layers": list(wanted.layers), "positions": positions}
    if wanted.positions is not None:
        record["positions_sha256"] = hashlib.sha256(json.dumps(sorted(wanted.positions)).encode()).hexdigest()
    if wanted.part == "position" and not wanted.first_order:
        record["first_order"] = False
    if wanted.orders:
        record |= {"orders": list(wanted.orders), "seed": wanted.seed}
    return record


def _table_of_effects(part: Part) -> str:
    return {"position": "effects", "sequence": "effects_sequence", "progressive": "progressive"}[part]
