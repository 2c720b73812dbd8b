"""The experiments of arXiv 2606.10703 as its released code runs them, on any model of the three families.

    with open_released(model, corpus) as run:
        run.audit()              # four metrics, highest against lowest active expert       Tables 1-3
        run.control()            # the same by routing weight                              Tables 4-6
        run.redistribution()     # gap norms from misaligned rows                          Table 7, Figure 2
        run.progressive()        # one to k-1 experts removed                              Tables 8-9

Each writes a table into the run's directory, measured once, text by text: a killed run resumes with the first text that it lacks.
What the released code does in place of the stated protocol is tabulated in `protocols`. One thing is not imitated:
router, final norm, unembedding and loss are in float32 here, whatever the dtype of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import pyarrow as pa

from hooked_moe.checks import whole_numbers
from hooked_moe.corpus import Corpus
from hooked_moe.loading.fingerprint import model_fingerprint, versions
from hooked_moe.measurement.manifest import Manifest
from hooked_moe.measurement.run_directory import claim
from hooked_moe.measurement.shard_files import ShardFiles, remove_shards
from hooked_moe.paper.metrics import released_redistribution
from hooked_moe.paper.padded_rows import LayerRows, PaddedTexts, observe_rows
from hooked_moe.paper.protocols import (
    Draw,
    Released,
    audit_draws,
    control_draws,
    describe,
    progressive_draw,
    protocol_layers,
    released_protocol,
)
from hooked_moe.paper.published import PAIRS
from hooked_moe.paper.ranked_removals import compare_experts, pick_experts, remove_progressively
from hooked_moe.paper.text_shards import TABLE
from hooked_moe.paper.texts import AuditTexts, encode_text, selected_texts
from hooked_moe.tables import (
    COMPARISONS,
    RELEASED_EXPERTS,
    RELEASED_PROGRESSIVE,
    RELEASED_REDISTRIBUTION,
    digest,
    read_parquet,
    table_with_schema,
    write_parquet_atomic,
)
from hooked_moe.transformer import Transformer


def open_released(
    model: Transformer,
    corpus: Corpus,
    layers: Iterable[int] | None = None,
    *,
    results: Path = Path("results"),
    name: str | None = None,
    progress: bool = True,
    log: Callable[[str], object] = lambda line: None,
) -> ReleasedRun:
    """The run of the released protocol under `results`/<model>/, new or to be continued; nothing is measured yet.

    `layers` None means the published ones of a published model, else all with experts. Raises `ValueError` for a family that the
    paper did not audit, for layers without experts, for a model without tokenizer, and for a directory of another run;
    `BlockingIOError` while another process writes there. `log` is called with the lines that tell of damaged files.
    """
    released = released_protocol(model.cfg.model_type)
    model.require_tokenizer()
    model.require_weights("the released protocol")
    cfg = model.cfg
    if layers is None:
        chosen = protocol_layers(cfg.model_type, cfg.n_layers, cfg.moe_layers)
    else:
        chosen = tuple(whole_numbers(layers, "layers", cfg.n_layers))
    without = [layer for layer in chosen if layer not in model.cfg.moe_layers]
    if without or not chosen:
        raise ValueError(f"layers {without or '()'} have no experts to remove; layers {model.cfg.moe_layers} have")
    plan = json.loads(json.dumps(_plan(model, corpus, chosen, released)))
    directory = results / Path(model.cfg.model_name).name / (name or f"released-{Path(corpus.name).stem}-{digest(plan)[:8]}")
    return ReleasedRun(directory, model, corpus, released, chosen, plan, claim(directory, plan), progress, log)


def _plan(model: Transformer, corpus: Corpus, layers: Sequence[int], released: Released) -> dict[str, Any]:
    """What identifies a run."""
    return {
        "format": 3,
        "model": model_fingerprint(model),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "documents": len(corpus.documents)},
        "protocol": describe(released) | {"layers": list(layers)},
        "versions": versions(),
    }


class ReleasedRun:
    """Open for writing: no other process can open it until the end of its `with` block. See the module's docstring."""

    def __init__(
        self,
        directory: Path,
        model: Transformer,
        corpus: Corpus,
        released: Released,
        layers: tuple[int, ...],
        plan: dict[str, Any],
        lock: filelock.BaseFileLock,
        progress: bool,
        log: Callable[[str], object],
    ) -> None:
        self.directory = directory
        self.model = model
        self.released = released
        self.layers = layers
        self._plan = plan
        self._log = log
        try:
            self._manifest = Manifest(directory, plan, _part_fault)
            self._damaged = self._manifest.damaged_files({}, log)
        except BaseException:
            lock.release()
            raise
        self._corpus = corpus
        self._texts = AuditTexts(model, corpus, released, layers, progress)
        self._lock = lock
        self._progress = progress

    def __enter__(self) -> ReleasedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says, or will say."""
        return self._manifest.values

    # --- experiments ------------------------------------------------------------------------------------------------------

    def audit(self, n: int = PAIRS) -> pa.Table:
        """`n` positions for each metric and layer: a row each, as in `tables.COMPARISONS`. Writes audit-<n>.parquet."""
        return self._comparisons("audit", n, lambda: audit_draws(self.released, self._texts.lengths, n, self.layers))

    def control(self, n: int = PAIRS) -> pa.Table:
        """The same with experts ranked by their routing weight at the position. Writes control-<n>.parquet."""
        texts = self._texts
        return self._comparisons(
            "control", n, lambda: control_draws(self.released, texts.lengths, n, self.layers, texts.weight_range)
        )

    def experts(self) -> pa.Table:
        """The four metrics of every expert in their released form. Writes experts.parquet."""
        return self._part("experts", None, RELEASED_EXPERTS, lambda _: self._texts.experts_table())

    def progressive(self, n: int | None = None) -> pa.Table:
        """One to k-1 experts removed at `n` positions (None: 500). Writes progressive-<n>.parquet.

        Raises `ValueError` for a family whose released code has no such experiment.
        """
        protocol = self.released.progressive
        if protocol is None:
            raise ValueError(f"the released progressive ablation is OLMoE's; {self.released.model_type} has --protocol defined")
        count = protocol.positions if n is None else n

        def measure(shards: ShardFiles) -> pa.Table:
            texts = selected_texts(protocol.texts, self._corpus)
            tokens: dict[int, list[int]] = {}

            def length(text: int) -> int:
                tokens[text] = encode_text(self.model, texts[text], protocol.texts.tokens)
                return len(tokens[text])

            drawn = progressive_draw(protocol, length, len(texts), count)
            return remove_progressively(self.model, self.layers, tokens, drawn, shards, self._progress)

        return self._part("progressive", count, RELEASED_PROGRESSIVE, measure)

    def redistribution(self) -> pa.Table:
        """Gap norms and compensation by expert, as released and from aligned rows. Writes redistribution.parquet.

        Raises `ValueError` for a family whose released code has no such experiment.
        """
        protocol = self.released.redistribution
        if protocol is None:
            raise ValueError(f"there is no released redistribution of {self.released.model_type}; use --protocol defined")

        def measure(_: ShardFiles) -> pa.Table:
            rule = protocol.texts
            texts = [
                encode_text(self.model, text, rule.tokens, protocol.special_tokens) for text in selected_texts(rule, self._corpus)
            ]
            padded = PaddedTexts.of(texts, self.model.require_tokenizer().pad_id, "right")
            return _redistribution_table(observe_rows(self.model, padded, self.layers, self._progress))

        return self._part("redistribution", None, RELEASED_REDISTRIBUTION, measure)

    # --- files ------------------------------------------------------------------------------------------------------------

    def _comparisons(self, name: str, n: int, draw: Callable[[], Mapping[tuple[str, int], Draw]]) -> pa.Table:
        """A part that removes the highest- and the lowest-ranked active expert at drawn positions."""

        def measure(shards: ShardFiles) -> pa.Table:
            picks = pick_experts(self._texts, draw())
            return compare_experts(self.model, self._texts, picks, shards, self._progress)

        return self._part(name, n, COMPARISONS, measure)

    def _part(self, name: str, n: int | None, schema: pa.Schema, measure: Callable[[ShardFiles], pa.Table]) -> pa.Table:
        """A table from its file, or measured into it."""
        stem = name if n is None else f"{name}-{n}"
        path, directory = self.directory / f"{stem}.parquet", self.directory / "shards" / stem
        if stem not in self._manifest.parts or path.name in self._damaged:
            shards = ShardFiles(directory, {"plan": digest(self._plan), "part": stem}, [TABLE], self._log)
            write_parquet_atomic(measure(shards).cast(schema), path)
            self._manifest.parts[stem] = {"positions": n}
            self._manifest.write([path.name])
            self._damaged.discard(path.name)
        remove_shards(directory)
        return read_parquet(path)


def _part_fault(part: str, record: Any) -> str | None:
    """What is wrong with a manifest's record of a part; None for nothing."""
    if not isinstance(record, dict) or not isinstance(record.get("positions"), int | None):
        return "has no number of positions"
    return None


def _redistribution_table(rows_by_layer: Mapping[int, LayerRows]) -> pa.Table:
    """Every expert with both pairings of rows, as in `tables.RELEASED_REDISTRIBUTION`."""
    tables = []
    for layer, rows in rows_by_layer.items():
        for pairing in ("as_released", "aligned"):
            by_expert = released_redistribution(rows, aligned=pairing == "aligned")
            n = len(by_expert.n_rows)
            keys = {"layer": np.full(n, layer), "expert": np.arange(n), "pairing": [pairing] * n}
            tables.append(table_with_schema(RELEASED_REDISTRIBUTION, keys | by_expert._asdict()))
    return pa.concat_tables(tables)
