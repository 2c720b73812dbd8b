"""The tokens that matter most to every expert: by what it does to them, not only by how strongly it is chosen."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.analysis.accumulators.top_entries import Scored, TopHeap
from hooked_moe.checks import whole_numbers
from hooked_moe.counterfactuals import expert_effects, expert_observations, first_order_effects
from hooked_moe.routing.pieces import Piece, Texts, pieces_of, run_in_batches
from hooked_moe.tables import Result, required_file, schema_of, table_with_schema
from hooked_moe.tables.effect_grid import effect_chunks
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.transformer import Transformer

By = Literal["weight", "gap_norm", "delta_loss", "kl", "first_order", "first_order_curved"]
_COLUMN = {"weight": "routing_weight"}
"""The column of an effect table, where its name is another."""

_TOP = schema_of(
    ("layer", pa.int16(), "index", "transformer block"),
    ("expert", pa.int16(), "index", "routed expert"),
    ("rank", pa.int32(), "rank", "0 is the most extreme"),
    ("value", pa.float32(), "as `by` says", "what tokens are ranked by"),
    ("document", pa.int32(), "index", "document of the corpus"),
    ("position", pa.int32(), "index", "token position inside the document"),
    ("token", pa.int32(), "token id", "the token"),
    ("before", pa.string(), "text", "what comes before it; null without a tokenizer"),
    ("text", pa.string(), "text", "the token as text"),
    ("after", pa.string(), "text", "what comes after it"),
)


@dataclass(frozen=True, repr=False)
class TopTokens(Result):
    """The most extreme tokens of every expert, in order."""

    by: str
    lowest: bool
    rows: pa.Table

    def table(self) -> pa.Table:
        return self.rows

    def metadata(self) -> dict[str, Any]:
        return {"by": self.by, "lowest": self.lowest}

    @classmethod
    def from_table(cls, table: pa.Table, metadata: Mapping[str, Any]) -> TopTokens:
        return cls(metadata["by"], metadata["lowest"], table.replace_schema_metadata(None))

    def summary(self) -> str:
        return f"{self.rows.num_rows:,} tokens with the {'lowest' if self.lowest else 'highest'} {self.by}"

    def of(self, layer: int, expert: int) -> TopTokens:
        """Those of one expert."""
        own = (self.rows["layer"].to_numpy() == layer) & (self.rows["expert"].to_numpy() == expert)
        return TopTokens(self.by, self.lowest, self.rows.filter(pa.array(own)))

    def _repr_html_(self) -> str:
        """Every token in its context, the first few dozen of them."""
        rows = []
        for row in self.rows.slice(0, _ROWS_SHOWN).to_pylist():
            before, text, after = (html.escape(row[name] or "") for name in ("before", "text", "after"))
            token = f"<b>{text or row['token']}</b>"
            cells = f"{row['layer']}", f"{row['expert']}", f"{row['value']:.4g}", f"{before}{token}{after}"
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("layer", "expert", html.escape(self.by), "token in its context"))
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


_ROWS_SHOWN = 40


def top_tokens(
    model: Transformer,
    texts: Texts | str | os.PathLike[str],
    by: By = "weight",
    n: int = 20,
    *,
    context: int = 16,
    lowest: bool = False,
    layers: Sequence[int] | None = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    n_ctx: int | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> TopTokens:
    """The n tokens of some texts that have the highest value of every expert that serves them.

        top_tokens(model, load_corpus("held-out"), by="kl").of(layer=3, expert=7)
        top_tokens(model, run.directory, by="delta_loss", lowest=True)       # of a finished measurement: seconds

    `by` is "weight", the routing weight as applied; "gap_norm", how far removing the expert would move the block's output; or
    what removing it there does: "delta_loss", the change of the loss (nats; `lowest` for tokens that it harms), "kl", that of the
    prediction, "first_order", the estimate from one gradient, "first_order_curved", the same with the softmax's curvature. Of
    texts, the first two cost one forward pass, the last two one backward pass, and the others what `expert_effects` does. A
    directory names a finished measurement, whose tables have all of them; the model then only lends its tokenizer.

    `context` tokens on both sides are shown; `progress` shows a bar that counts tokens of texts. Equal values are in the order of
    the texts. Beside the tokens, memory holds n entries an expert. Raises `ValueError` for another `by`, `n` below 1, layers
    without experts, and as `routing_table` does; `FileNotFoundError` for a directory without those tables.
    """
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(map(repr, get_args(By)))}, not {by!r}")
    if n < 1 or context < 0:
        raise ValueError(f"n must be 1 or more and context 0 or more, not {n} and {context}")
    heap = TopHeap(n, lowest)
    if isinstance(texts, str | os.PathLike):
        heap.add_all(_of_run(Path(texts), by, layers))
        tokens = _tokens_of_run(Path(texts), heap.documents)
    else:
        pieces = pieces_of(model, texts, attention_mask, n_ctx).pieces
        heap.add_all(_measured(model, pieces, by, layers, memory_budget, progress))
        tokens = _tokens_of_pieces(pieces, heap.documents)
    return TopTokens(by, lowest, _with_contexts(heap, tokens, context, model.tokenizer))


def _measured(
    model: Transformer, pieces: list[Piece], by: By, layers: Sequence[int] | None, budget: int | str | None, progress: bool
) -> Iterator[Scored]:
    def run(tokens: Tensor, real: Tensor | None) -> Any:
        effects, values = _asked(model, tokens, real, by, layers, budget)
        expert, value = (x.movedim(0, 2).cpu().numpy() for x in (effects.expert_index, values))
        return lambda row, own: (effects.layers, expert[row, own], value[row, own])

    for piece, (measured, expert, value) in run_in_batches(model, pieces, run, progress):
        yield Scored(measured, np.full(len(piece.own), piece.document), piece.positions, expert, value)


def _asked(
    model: Transformer, tokens: Tensor, real: Tensor | None, by: By, layers: Sequence[int] | None, budget: int | str | None
) -> tuple[Any, Tensor]:
    if by in ("first_order", "first_order_curved"):
        estimates = first_order_effects(model, tokens, layers, real, memory_budget=budget)
        return estimates, getattr(estimates, by)
    if by in ("weight", "gap_norm"):
        observed = expert_observations(model, tokens, layers, real)
        return observed, observed.routing_weight if by == "weight" else observed.gap_norm
    effects = expert_effects(model, tokens, layers, attention_mask=real, memory_budget=budget)
    return effects, effects.delta_loss if by == "delta_loss" else effects.kl


def _of_run(run: Path, by: By, layers: Sequence[int] | None) -> Iterator[Scored]:
    path = required_file(run, "effects.parquet", "it is no finished measurement: give the directory of a run")
    column = _COLUMN.get(by, by)
    if column not in pq.read_schema(path).names:
        raise ValueError(f"{path} has no column {column}: it was measured without it; measure again, or rank by something else")
    for grid in effect_chunks(path, ("expert", "delta_loss", column)):
        chosen = list(grid.layers) if layers is None else whole_numbers(layers, "layers")
        axes = [grid.layer_axis(layer) for layer in chosen]
        yield Scored(chosen, grid.document, grid.position, grid.expert[:, axes], getattr(grid, column)[:, axes])


@dataclass(frozen=True)
class _Text:
    """The tokens of a document, which may have gaps."""

    positions: Int[np.ndarray, " token"]
    tokens: Int[np.ndarray, " token"]

    def between(self, start: int, stop: int) -> list[int]:
        own = slice(*np.searchsorted(self.positions, (start, stop)))
        return self.tokens[own].tolist()


def _tokens_of_pieces(pieces: list[Piece], documents: list[int]) -> dict[int, _Text]:
    by_document: dict[int, list[Piece]] = {document: [] for document in documents}
    for piece in pieces:
        if piece.document in by_document:
            by_document[piece.document].append(piece)
    return {
        document: _Text(*(np.concatenate(parts) for parts in zip(*((p.positions, p.tokens[p.own]) for p in own), strict=True)))
        for document, own in by_document.items()
    }


def _tokens_of_run(run: Path, documents: list[int]) -> dict[int, _Text]:
    path = required_file(run, "tokens.parquet", "it is no finished measurement: give the directory of a run")
    names = ["document", "position", "token"]
    parts: list[list[np.ndarray]] = []
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(columns=names, use_threads=False):
        columns = [batch[name].to_numpy() for name in names]
        own = np.isin(columns[0], documents)
        parts.append([column[own] for column in columns])
    document, position, token = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {number: _Text(position[document == number], token[document == number]) for number in documents}


def _with_contexts(heap: TopHeap, tokens: dict[int, _Text], context: int, tokenizer: Tokenizer | None) -> pa.Table:
    own: list[int] = []
    texts: dict[str, list[str | None]] = {"before": [], "text": [], "after": []}
    for document, at in zip(heap.entries["document"].tolist(), heap.entries["position"].tolist(), strict=True):
        text = tokens[document]
        parts = text.between(at - context, at), text.between(at, at + 1), text.between(at + 1, at + 1 + context)
        own += parts[1]
        for name, ids in zip(texts, parts, strict=True):
            texts[name].append(None if tokenizer is None else tokenizer.decode(ids))
    columns = heap.entries | {"rank": heap.rank, "value": heap.sign * heap.value, "token": own} | texts
    return table_with_schema(_TOP, columns)
