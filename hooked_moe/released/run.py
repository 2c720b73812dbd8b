"""The experiments of arXiv 2606.10703 as its released code runs them, on any model of the three families.

    with open_released(model, corpus) as run:
        run.audit()              # four metrics, highest against lowest active expert       Tables 1-3
        run.control()            # the same by routing weight                              Tables 4-6
        run.redistribution()     # gap norms from misaligned rows                          Table 7, Figure 2
        run.progressive()        # one to k-1 experts removed                              Tables 8-9

Each writes a table into the run's directory, measured once, text by text: a killed run goes on with the first text that it lacks.
What the released code does in place of the stated protocol is tabulated in `protocols`. One thing is not imitated:
router, final norm, unembedding and loss are in float32 here, whatever the dtype of the weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from tqdm import tqdm

from hooked_moe.corpus import Corpus
from hooked_moe.counterfactuals import expert_observations
from hooked_moe.measurement.fingerprint import config_values, versions, weights_sha256
from hooked_moe.measurement.run_directory import claim, digest, read_json
from hooked_moe.measurement.shards import in_parallel, workers_for
from hooked_moe.model import HookedMoE
from hooked_moe.released.metrics import PerExpert, released_criteria, released_redistribution
from hooked_moe.released.padded_rows import LayerRows, PaddedTexts, observe_rows
from hooked_moe.released.protocols import (
    Draw,
    Released,
    TextRule,
    audit_draws,
    control_draws,
    describe,
    progressive_draw,
    protocol_layers,
    released_protocol,
)
from hooked_moe.released.published import CONTROL, METRICS, PAIRS
from hooked_moe.released.sequence_removals import SequenceRemoval, sequence_removals
from hooked_moe.tables import (
    COMPARISONS,
    RELEASED_EXPERTS,
    RELEASED_PROGRESSIVE,
    RELEASED_REDISTRIBUTION,
    write_json_atomic,
    write_parquet_atomic,
)


def open_released(
    model: HookedMoE,
    corpus: Corpus,
    layers: Sequence[int] | None = None,
    *,
    results: Path = Path("results"),
    name: str | None = None,
    progress: bool = True,
) -> ReleasedRun:
    """The run of the released protocol under `results`/<model>/, new or to be continued; nothing is measured yet.

    `layers` None means the published ones of a published model, else all with experts. Raises `ValueError` for a family that the
    paper did not audit, for layers without experts, for a model without tokenizer, and for a directory of another run;
    `BlockingIOError` while another process writes there.
    """
    released = released_protocol(model.cfg.model_type)
    model.require_tokenizer()
    model.require_weights("the released protocol")
    chosen = protocol_layers(model.cfg.model_type, model.cfg.n_layers, model.cfg.moe_layers) if layers is None else tuple(layers)
    without = [layer for layer in chosen if layer not in model.cfg.moe_layers]
    if without or not chosen:
        raise ValueError(f"layers {without or '()'} have no experts to remove; layers {model.cfg.moe_layers} have")
    plan = json.loads(json.dumps(_plan(model, corpus, chosen, released)))
    directory = results / Path(model.cfg.model_name).name / (name or f"released-{Path(corpus.name).stem}-{digest(plan)[:8]}")
    return ReleasedRun(directory, model, corpus, released, chosen, plan, claim(directory, plan), progress)


def _plan(model: HookedMoE, corpus: Corpus, layers: Sequence[int], released: Released) -> dict[str, Any]:
    return {
        "format": 2,
        "model": {
            "name": model.cfg.model_name,
            "revision": model.cfg.revision,
            "weights_sha256": weights_sha256(model),
            "config": config_values(model.cfg),
        },
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "documents": len(corpus.documents)},
        "protocol": describe(released) | {"layers": list(layers)},
        "versions": versions(),
    }


class _Pick(NamedTuple):
    """One comparison: which two experts are removed, where."""

    layer: int
    ranking: str
    text: int
    position: int
    high: int
    low: int
    high_score: float
    low_score: float


class ReleasedRun:
    """Open for writing: no other process can open it until the end of its `with` block. See the module's docstring."""

    def __init__(
        self,
        directory: Path,
        model: HookedMoE,
        corpus: Corpus,
        released: Released,
        layers: tuple[int, ...],
        plan: dict[str, Any],
        lock: filelock.BaseFileLock,
        progress: bool,
    ) -> None:
        self.directory = directory
        self.model = model
        self.released = released
        self.layers = layers
        self.manifest: dict[str, Any] = plan | {"parts": {}}
        if (directory / "manifest.json").exists():
            self.manifest = read_json(directory / "manifest.json")
        self._corpus = corpus
        self._lock = lock
        self._progress = progress

    def __enter__(self) -> ReleasedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    # --- experiments ------------------------------------------------------------------------------------------------------

    def audit(self, n: int = PAIRS) -> pa.Table:
        """`n` positions for each metric and layer: a row each, as in `tables.COMPARISONS`. Writes audit-<n>.parquet."""

        def picks() -> list[_Pick]:
            draws = audit_draws(self.released, self._lengths(self._texts), n, self.layers)
            return [pick for cell, draw in draws.items() for pick in self._picks(*cell, draw)]

        return self._part("audit", n, COMPARISONS, lambda path: self._compare(picks(), path))

    def control(self, n: int = PAIRS) -> pa.Table:
        """The same with experts ranked by their routing weight at the position. Writes control-<n>.parquet."""

        def weight_range(layer: int, text: int, position: int) -> float:
            weights = self._rows[layer].routing_weight[text, self._row(text, position)]
            return float(weights[0] - weights[-1])

        def picks() -> list[_Pick]:
            draws = control_draws(self.released, self._lengths(self._texts), n, self.layers, weight_range)
            return [pick for cell, draw in draws.items() for pick in self._picks(*cell, draw)]

        return self._part("control", n, COMPARISONS, lambda path: self._compare(picks(), path))

    def experts(self) -> pa.Table:
        """The four metrics of every expert in their released form. Writes experts.parquet."""
        return self._part("experts", None, RELEASED_EXPERTS, lambda _: self._experts_table())

    def progressive(self, n: int | None = None) -> pa.Table:
        """One to k-1 experts removed at `n` positions (None: 500). Writes progressive-<n>.parquet.

        Raises `ValueError` for a family whose released code has no such experiment.
        """
        protocol = self.released.progressive
        if protocol is None:
            raise ValueError(f"the released progressive ablation is OLMoE's; {self.released.model_type} has --protocol defined")
        count = protocol.positions if n is None else n

        def measure(shards: Path) -> pa.Table:
            texts = protocol.texts.select(document.text for document in self._corpus.documents)
            tokens: dict[int, list[int]] = {}

            def length(text: int) -> int:
                tokens[text] = self._encode(texts[text], protocol.texts.tokens)
                return len(tokens[text])

            drawn = progressive_draw(protocol, length, len(texts), count)
            return self._remove_progressively({text: tokens[text] for text in drawn[:, 0].tolist()}, drawn, shards)

        return self._part("progressive", count, RELEASED_PROGRESSIVE, measure)

    def redistribution(self) -> pa.Table:
        """Gap norms and compensation by expert, as released and from aligned rows. Writes redistribution.parquet.

        Raises `ValueError` for a family whose released code has no such experiment.
        """
        protocol = self.released.redistribution
        if protocol is None:
            raise ValueError(f"there is no released redistribution of {self.released.model_type}; use --protocol defined")

        def measure(_: Path) -> pa.Table:
            texts = [
                self._encode(text, protocol.texts.tokens, protocol.special_tokens)
                for text in protocol.texts.select(document.text for document in self._corpus.documents)
            ]
            padded = PaddedTexts.of(texts, self.model.require_tokenizer().pad_id, "right")
            rows = observe_rows(self.model, padded, self.layers, self._progress)
            return _redistribution_table(rows)

        return self._part("redistribution", None, RELEASED_REDISTRIBUTION, measure)

    # --- texts and rows ---------------------------------------------------------------------------------------------------

    def _encode(self, text: str, limit: int, special_tokens: bool = True) -> list[int]:
        """Token ids as the checkpoint's tokenizer gives them, cut to the limit and to the model's context."""
        ids = self.model.require_tokenizer().encode(text, None if special_tokens else False)
        return ids[: min(limit, self.model.cfg.n_ctx)]

    @cached_property
    def _texts(self) -> list[list[int]]:
        rule: TextRule = self.released.texts
        return [self._encode(text, rule.tokens) for text in rule.select(document.text for document in self._corpus.documents)]

    @staticmethod
    def _lengths(texts: Sequence[Sequence[int]]) -> list[int]:
        return [len(text) for text in texts]

    @cached_property
    def _padded(self) -> PaddedTexts:
        return PaddedTexts.of(self._texts, self.model.require_tokenizer().pad_id, self.released.padding or "right")

    @cached_property
    def _rows(self) -> dict[int, LayerRows]:
        return observe_rows(self.model, self._padded, self.layers, self._progress)

    def _row(self, text: int, position: int) -> int:
        """Where a token of a text stands in its padded row."""
        left = self._padded.padding == "left"
        return position + (self._padded.tokens.shape[1] - len(self._texts[text]) if left else 0)

    @cached_property
    def _criteria(self) -> dict[int, dict[str, PerExpert]]:
        return {layer: released_criteria(rows, self.released) for layer, rows in self._rows.items()}

    def _experts_table(self) -> pa.Table:
        parts = []
        for layer, criteria in self._criteria.items():
            n = len(criteria[METRICS[0]])
            parts.append(pa.table({"layer": np.full(n, layer), "expert": np.arange(n), **criteria}).cast(RELEASED_EXPERTS))
        return pa.concat_tables(parts)

    # --- removals ---------------------------------------------------------------------------------------------------------

    def _picks(self, ranking: str, layer: int, draw: Draw) -> list[_Pick]:
        """The active experts ranked highest and lowest at every drawn position."""
        rows, picks = self._rows[layer], []
        for text, position in draw.tolist():
            row = self._row(text, position)
            experts = rows.expert[text, row]
            if ranking == CONTROL:
                score = rows.routing_weight[text, row].astype(np.float64)
            else:
                score = self._criteria[layer][ranking][experts]
            order = np.nan_to_num(score, nan=-np.inf)  # an undefined score ranks last, as it does in pandas
            high, low = int(order.argmax()), int(order.argmin())
            picks.append(
                _Pick(
                    layer, ranking, text, position, int(experts[high]), int(experts[low]), float(score[high]), float(score[low])
                )
            )
        return picks

    def _compare(self, picks: list[_Pick], shards: Path) -> pa.Table:
        """Remove both experts of every comparison."""
        by_text: dict[int, list[int]] = defaultdict(list)
        for number, pick in enumerate(picks):
            by_text[pick.text].append(number)

        def measure(text: int) -> Float[np.ndarray, "kind number"]:
            own = [picks[number] for number in by_text[text]]
            removals = [SequenceRemoval(p.layer, frozenset([e]), p.position) for p in own for e in (p.high, p.low)]
            losses = sequence_removals(self.model, torch.tensor(self._texts[text]), removals)
            delta = losses.removed - losses.baseline
            return np.stack([losses.baseline[::2], delta[::2], delta[1::2]])

        values = np.empty((3, len(picks)))
        for text, found in self._text_by_text(sorted(by_text), measure, shards).items():
            values[:, by_text[text]] = found
        columns = dict(zip(_Pick._fields, zip(*picks, strict=True), strict=True))
        columns |= {"high_expert": columns.pop("high"), "low_expert": columns.pop("low")}
        measured = dict(zip(("baseline_loss", "high_delta", "low_delta"), values, strict=True))
        return _table(COMPARISONS, columns | measured)

    def _remove_progressively(self, texts: Mapping[int, list[int]], drawn: Draw, shards: Path) -> pa.Table:
        k = self.model.cfg.experts_per_token

        def measure(text: int) -> Float[np.ndarray, "kind number"]:
            tokens = torch.tensor(texts[text])
            (position,) = drawn[drawn[:, 0] == text, 1].tolist()
            routed = expert_observations(self.model, tokens[None], self.layers)  # no hooks, which texts side by side would share
            removals = []
            for layer, indices in zip(routed.layers, routed.expert_index, strict=True):
                active = indices[0, position].tolist()  # by falling weight
                removals += [SequenceRemoval(layer, frozenset(active[:count]), position) for count in range(1, k)]
            losses = sequence_removals(self.model, tokens, removals)
            return np.stack([losses.baseline, losses.removed - losses.baseline])

        found = self._text_by_text(drawn[:, 0].tolist(), measure, shards)
        per_text = len(self.layers) * (k - 1)
        columns = {
            "layer": np.tile(np.repeat(self.layers, k - 1), len(drawn)),
            "text": np.repeat(drawn[:, 0], per_text),
            "position": np.repeat(drawn[:, 1], per_text),
            "removed": np.tile(np.arange(1, k), len(drawn) * len(self.layers)),
        }
        losses = np.concatenate([found[text] for text in drawn[:, 0].tolist()], axis=1)
        return _table(RELEASED_PROGRESSIVE, columns | {"baseline_loss": losses[0], "delta_loss": losses[1]})

    def _text_by_text(
        self, texts: Sequence[int], measure: Callable[[int], Float[np.ndarray, "kind number"]], shards: Path
    ) -> dict[int, Float[np.ndarray, "kind number"]]:
        """What `measure` finds in every text, kept in a shard each."""
        shards.mkdir(parents=True, exist_ok=True)
        paths = {text: shards / f"{text:06d}.parquet" for text in texts}

        def measure_texts(some: list[int]) -> list[int]:
            for text in some:
                values = measure(text)
                write_parquet_atomic(pa.table({str(kind): row for kind, row in enumerate(values)}), paths[text])
            return some

        pending = [text for text, path in paths.items() if not path.exists()]
        with tqdm(total=len(texts), desc=f"{shards.name}, whole texts", unit="text", disable=not self._progress) as bar:
            bar.update(len(texts) - len(pending))
            for done in in_parallel(measure_texts, [[text] for text in pending], workers_for(self.model, len(texts))):
                bar.update(len(done))
        tables = {text: pq.read_table(path, use_threads=False) for text, path in paths.items()}
        return {text: np.stack([column.to_numpy() for column in table.columns]) for text, table in tables.items()}

    # --- files ------------------------------------------------------------------------------------------------------------

    def _part(self, name: str, n: int | None, schema: pa.Schema, measure: Callable[[Path], pa.Table]) -> pa.Table:
        """A table from its file, or measured into it."""
        stem = name if n is None else f"{name}-{n}"
        path, shards = self.directory / f"{stem}.parquet", self.directory / "shards" / stem
        if not path.exists():
            write_parquet_atomic(measure(shards).cast(schema), path)
        self.manifest["parts"] |= {stem: {"positions": n}}
        write_json_atomic(self.manifest, self.directory / "manifest.json")
        if shards.exists():
            for shard in shards.glob("*.parquet"):
                shard.unlink()
            shards.rmdir()
        return pq.read_table(path, use_threads=False)


def _redistribution_table(rows: Mapping[int, LayerRows]) -> pa.Table:
    parts = []
    for layer, of_layer in rows.items():
        for pairing in ("as_released", "aligned"):
            found = released_redistribution(of_layer, aligned=pairing == "aligned")
            n = len(found.n_rows)
            keys = {"layer": np.full(n, layer), "expert": np.arange(n), "pairing": [pairing] * n}
            parts.append(_table(RELEASED_REDISTRIBUTION, keys | found._asdict()))
    return pa.concat_tables(parts)


def _table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
