"""Where every token goes: one row per (document, position, layer, slot), streamed over a corpus of any size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.checks import whole_numbers
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels import routing
from hooked_moe.routing.pieces import Piece, Texts, pieces_of, run_in_batches
from hooked_moe.routing.rule import rule_of
from hooked_moe.tables import Result, atomic_path, schema_of, table_with_schema
from hooked_moe.tables.files import parquet_writer
from hooked_moe.tables.result import ROWS_SHOWN, readable
from hooked_moe.transformer import Transformer

SINK_RATIO: Final = 10.0
"""A token whose residual stream is so many times longer than the median one of its window is a sink."""
CHUNK_ROWS: Final = 1 << 20

ROUTES: Final = schema_of(
    ("document", pa.int32(), "index", "document of the corpus, or row of the tokens given, counted from 0"),
    ("position", pa.int32(), "index", "token position inside the document, counted from 0"),
    ("token", pa.int32(), "token id", "input token"),
    ("layer", pa.int16(), "index", "transformer block, counted from 0"),
    ("slot", pa.int8(), "index", "rank of the expert among the active ones; 0 has the highest score"),
    ("expert", pa.int16(), "index", "routed expert"),
    ("routing_weight", pa.float32(), "1", "weight of the expert as applied, after renormalisation and scaling"),
    ("probability", pa.float32(), "1", "the router's score of the expert, among all experts"),
    ("entropy", pa.float32(), "nats", "entropy of the router's scores here, divided by their sum; the same in all slots"),
    (
        "margin",
        pa.float32(),
        "logits",
        "router logit of the expert less that of the next one in line, the best not selected of the token's groups; "
        "NaN where every expert is selected, and where a learned bias has a say in the selection",
    ),
    (
        "sink",
        pa.bool_(),
        "yes or no",
        f"whether the residual stream before the experts is {SINK_RATIO:g} times longer than the window's median: "
        "massive activations (arXiv 2402.17762)",
    ),
)
_BY_TOKEN = ("document", "position", "token")

Table = TypeVar("Table", bound="RoutingTable")


@dataclass(frozen=True, repr=False)
class RoutingTable(Result):
    """Where tokens go: rows in the order document, position, layer, slot, as `ROUTES` describes them.

    `RoutingTable.load(path)` reads a file into memory; `RoutingTable.open(path)` leaves the rows in it, and every function that
    takes the table reads them in chunks.
    """

    model: str
    experts: dict[int, int]
    """Routed experts of every layer in the table."""
    slots: int
    """Experts per token."""
    domains: list[str]
    """The domain of every document."""
    rows: pa.Table | Path

    @property
    def layers(self) -> list[int]:
        return list(self.experts)

    @property
    def n_rows(self) -> int:
        return self.rows.num_rows if isinstance(self.rows, pa.Table) else pq.read_metadata(self.rows).num_rows

    @property
    def n_tokens(self) -> int:
        return self.n_rows // (len(self.layers) * self.slots)

    def table(self) -> pa.Table:
        if isinstance(self.rows, pa.Table):
            return self.rows
        with readable(self.rows):
            return pq.read_table(self.rows, page_checksum_verification=True)

    def summary(self) -> str:
        layers = f"{len(self.layers)} layers x {self.slots} slots"
        return f"{self.model}: {self.n_tokens:,} tokens of {len(self.domains):,} documents, {layers}"

    def metadata(self) -> dict[str, Any]:
        experts = {str(layer): n for layer, n in self.experts.items()}
        return {"model": self.model, "experts": experts, "slots": self.slots, "domains": self.domains}

    @classmethod
    def from_table(cls: type[Table], table: pa.Table, metadata: Mapping[str, Any]) -> Table:
        return cls(rows=table.replace_schema_metadata(None), **_from_json(metadata))

    @classmethod
    def open(cls: type[Table], path: str | os.PathLike[str]) -> Table:
        """A table whose rows stay in the file. Raises as `load` does, for damaged rows when they are read."""
        return cls(rows=Path(path), **_from_json(cls.metadata_of_file(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        if isinstance(self.rows, pa.Table):
            super().save(path)
        elif self.rows.resolve() != Path(path).resolve():
            with atomic_path(path) as temporary:
                shutil.copyfile(self.rows, temporary)

    def preview(self) -> tuple[pa.Table, int]:
        return next(self._pieces(ROWS_SHOWN)), self.n_rows

    def chosen_layers(self, layers: Sequence[int] | None) -> list[int]:
        """Layers asked for, or all. Raises `ValueError` for those that the table lacks."""
        chosen = self.layers if layers is None else whole_numbers(layers, "layers")
        missing = [layer for layer in chosen if layer not in self.experts]
        if missing or not chosen:
            raise ValueError(f"layers {missing} are not in this table, which has {self.layers}")
        return chosen

    def grids(self, *columns: str, positions: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The rows in chunks of P tokens, as arrays: document, position and token [P], each of `columns` [P layer slot].

        `positions` is how many tokens that is, None a good number.

        Raises `ValueError` where rows are missing or in another order.
        """
        per_token = len(self.layers) * self.slots
        layer, slot = np.repeat(self.layers, self.slots), np.tile(np.arange(self.slots), len(self.layers))
        positions = max(CHUNK_ROWS // per_token, 1) if positions is None else positions
        for piece in self._pieces(positions * per_token, {*_BY_TOKEN, "layer", "slot", *columns}):
            if piece.num_rows % per_token or not all(
                np.array_equal(
                    piece[name].to_numpy().reshape(-1, per_token), np.broadcast_to(due, (piece.num_rows // per_token, per_token))
                )
                for name, due in (("layer", layer), ("slot", slot))
            ):
                raise ValueError(
                    "this routing table lacks rows, or has them in another order than document, position, layer, slot"
                )
            by_token = {name: piece[name].to_numpy()[::per_token] for name in _BY_TOKEN}
            shape = (-1, len(self.layers), self.slots)
            yield by_token | {name: piece[name].to_numpy(zero_copy_only=False).reshape(shape) for name in columns}

    def _pieces(self, rows: int, columns: set[str] | None = None) -> Iterator[pa.Table]:
        names = [name for name in ROUTES.names if columns is None or name in columns]
        if isinstance(self.rows, pa.Table):
            table = self.rows.select(names)
            yield from (table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows))
            return
        held: list[pa.RecordBatch] = []
        with readable(self.rows):
            file = pq.ParquetFile(self.rows, pre_buffer=False, page_checksum_verification=True)
            for batch in file.iter_batches(rows, columns=names, use_threads=False):
                held.append(batch)
                table = pa.Table.from_batches(held)
                if table.num_rows >= rows:
                    yield table.slice(0, rows).combine_chunks()
                    held = table.slice(rows).to_batches()
        if sum(batch.num_rows for batch in held):
            yield pa.Table.from_batches(held).combine_chunks()


def _from_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {**metadata, "experts": {int(layer): n for layer, n in metadata["experts"].items()}}


@torch.no_grad()
def routing_table(
    model: Transformer,
    texts: Texts,
    layers: Sequence[int] | None = None,
    *,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    n_ctx: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> RoutingTable:
    """Where a model sends every token of some texts, at the cost of one forward pass without its logits.

        table = routing_table(model, load_corpus("held-out"))
        table = routing_table(model, ["a text", "another"], layers=[2])
        table = routing_table(model, tokens, attention_mask=mask)        # document: batch row; position: as in the row
        table = routing_table(model, corpus, path="routes.parquet")      # any size: rows go into the file as they come

    `texts` is a corpus, a list of texts, or token ids [batch, pos]; a corpus and texts are cut into windows of `n_ctx` tokens
    (default: the model's context) as in a measurement, with the BOS token that the checkpoint wants, which has no row. `layers`
    None means all that have experts. Hooks on the model act: inside `steer_routes` the table is that of the steered model.
    `progress` shows a bar. Raises `ValueError` for layers that do not exist or are dense, and for texts that cannot be run.
    """
    layers = model.cfg.moe_layers if layers is None else list(dict.fromkeys(whole_numbers(layers, "layers")))
    wrong = [layer for layer in layers if layer not in model.cfg.moe_layers]
    if wrong or not layers:
        raise ValueError(f"layers {wrong} have no experts; layers {model.cfg.moe_layers} have")
    pieces = pieces_of(model, texts, attention_mask, n_ctx)
    experts = {layer: model.cfg.experts_in(layer) for layer in sorted(layers)}
    result = RoutingTable(model.cfg.model_name, experts, model.cfg.experts_per_token, pieces.domains, ROUTES.empty_table())
    rows = _rows(model, pieces.pieces, result.layers, progress)
    if path is None:
        return replace(result, rows=pa.concat_tables(rows).replace_schema_metadata(None))
    schema = ROUTES.with_metadata(result.file_labels())
    with atomic_path(path) as temporary, parquet_writer(schema, temporary) as writer:
        for piece in rows:
            writer.write_table(piece.replace_schema_metadata(schema.metadata))
    return replace(result, rows=Path(path))


def _rows(model: Transformer, pieces: list[Piece], layers: list[int], progress: bool) -> Iterator[pa.Table]:
    """The table in parts of at least 2^17 rows, so that a file has few row groups."""
    held: list[pa.Table] = []
    run = partial(_observed, model, layers=layers, rule=rule_of(model))
    for piece, columns in run_in_batches(model, pieces, run, progress):
        held.append(_piece_rows(piece, columns, layers))
        if sum(table.num_rows for table in held) >= 1 << 17:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _piece_rows(piece: Piece, columns: dict[str, np.ndarray], layers: list[int]) -> pa.Table:
    shape = columns["expert"].shape
    values = columns | {
        "document": np.asarray(piece.document),
        "position": piece.positions[:, None, None],
        "token": piece.tokens[piece.own][:, None, None],
        "layer": np.asarray(layers)[:, None],
        "slot": np.arange(shape[-1]),
    }
    types = {field.name: field.type.to_pandas_dtype() for field in ROUTES}
    return table_with_schema(ROUTES, {n: np.broadcast_to(v, shape).astype(types[n]).ravel() for n, v in values.items()})


def _observed(model: Transformer, tokens: Tensor, real: Tensor | None, layers: list[int], rule: routing.RoutingRule) -> Any:
    """A function of (row, own tokens) that gives the columns of a piece, [own layer slot]."""
    norms: dict[int, Tensor] = {}

    def keep_norm(resid: Tensor, hook: HookPoint) -> None:  # not the streams themselves: of all layers, they are large
        norms[hook.layer()] = resid.norm(dim=-1, dtype=torch.float32)

    names = [f"blocks.{layer}.{point}" for layer in layers for point in _HOOKS]
    with model.hooks([(f"blocks.{layer}.hook_resid_mid", keep_norm) for layer in layers]):
        _, cache = model.run_with_cache(tokens, attention_mask=real, names_filter=names, stop_at_layer=max(layers) + 1)
    by_layer = []
    for layer in layers:
        logits, indices, weights = (cache[f"blocks.{layer}.{point}"] for point in _HOOKS)
        typical = (
            (norms[layer] if real is None else norms[layer].masked_fill(~real, torch.nan)).nanmedian(-1, keepdim=True).values
        )
        columns = routes_of(logits, indices, rule)
        if model.cfg.selection_bias:  # then the next in line is not that of the scores
            columns["margin"] = torch.full_like(columns["margin"], torch.nan)
        columns |= {
            "expert": indices,
            "routing_weight": weights.float(),
            "sink": (norms[layer] > SINK_RATIO * typical)[..., None],
        }
        by_layer.append({name: column.expand(indices.shape).cpu().numpy() for name, column in columns.items()})

    def of_row(row: int, own: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.stack([columns[name][row, own] for columns in by_layer], axis=1) for name in by_layer[0]}

    return of_row


_HOOKS = ("mlp.hook_router_logits", "mlp.hook_expert_indices", "mlp.hook_expert_weights")


def routes_of(logits: Tensor, indices: Tensor, rule: routing.RoutingRule) -> dict[str, Tensor]:
    """What the router's logits [batch pos expert] say of the selected experts [batch pos slot]."""
    scores = routing.score(logits, rule)
    shares = scores / scores.sum(-1, keepdim=True)
    entropy = -torch.where(shares > 0, shares * shares.log(), 0.0).sum(-1, keepdim=True)
    return {"probability": scores.gather(-1, indices), "entropy": entropy, "margin": _margins(logits, scores, indices, rule)}


def _margins(logits: Tensor, scores: Tensor, indices: Tensor, rule: routing.RoutingRule) -> Tensor:
    """How far each selected expert's logit is above that of the next in line."""
    if rule.groups_kept * (logits.shape[-1] // rule.groups) <= rule.slots:
        return torch.full_like(indices, torch.nan, dtype=logits.dtype)
    in_line = routing.select(scores, replace(rule, slots=rule.slots + 1))
    selected = (in_line.unsqueeze(-1) == indices.unsqueeze(-2)).any(-1)
    following = in_line.gather(-1, selected.int().argmin(-1, keepdim=True))  # the first that is not selected
    return logits.gather(-1, indices) - logits.gather(-1, following)
