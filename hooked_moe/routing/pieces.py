"""What is run to see where tokens go: a corpus, texts or token ids, as pieces without padding that share batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.corpus import Corpus, Document
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

Texts: TypeAlias = Corpus | TokenizedCorpus | Sequence[str] | Int[Tensor, "batch pos"]
"""A corpus, texts, or token ids, whose rows are documents then."""

TOKENS_PER_BATCH = 2048
BATCHES_AHEAD = 8
"""Batches' worth of pieces that are looked at together, so that those of like length share a batch."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of tokens that see each other: a window of a document."""

    document: int
    tokens: Int[np.ndarray, " token"]
    own: Int[np.ndarray, " own"]
    """Which of the tokens the piece reports: not a BOS token, and not one that the document's next window begins with."""
    positions: Int[np.ndarray, " own"]
    """Where these are in the document."""


@dataclass(frozen=True)
class Pieces:
    """Documents as pieces, in order, and the domain of every document."""

    pieces: list[Piece]
    domains: list[str]


def pieces_of(
    model: Transformer,
    texts: Texts,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    n_ctx: int | None = None,
) -> Pieces:
    """The pieces of any texts. `n_ctx` is the length of windows of a corpus (default: the model's context).

    Raises `ValueError` for anything else, and as the model and `TokenizedCorpus` do.
    """
    if isinstance(texts, Tensor):
        return _of_tokens(model, texts, attention_mask)
    if attention_mask is not None:
        raise ValueError("attention_mask goes with token ids; texts need none")
    if isinstance(texts, TokenizedCorpus):
        if n_ctx is not None:
            raise ValueError(f"n_ctx={n_ctx} comes too late: this corpus has been cut into windows of {texts.n_ctx} tokens")
        return _of_corpus(texts)
    if isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts):
        if not texts:
            raise ValueError("no texts given")
        texts = Corpus("texts", [Document(str(number), "texts", "", text) for number, text in enumerate(texts)], "")
    if not isinstance(texts, Corpus):
        got = f"the text {texts[:40]!r}" if isinstance(texts, str) else type(texts).__name__
        raise ValueError(f"expected load_corpus(name), a list of texts, or token ids [batch, pos], not {got}")
    return _of_corpus(TokenizedCorpus(model, texts, model.cfg.n_ctx if n_ctx is None else n_ctx))


def _of_corpus(corpus: TokenizedCorpus) -> Pieces:
    pieces = []
    for windows in corpus.documents:
        for window in windows:
            own = np.arange(corpus.first, len(window.tokens) - (window is not windows[-1]))
            pieces.append(Piece(window.document, window.tokens, own, window.start + own - corpus.first))
    return Pieces(pieces, [document.domain for document in corpus.corpus.documents])


def _of_tokens(model: Transformer, tokens: Tensor, attention_mask: Tensor | None) -> Pieces:
    """Rows as documents; positions are those of the rows as given, padding counted."""
    tokens, real = model.as_tokens(tokens, attention_mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    empty = (~real.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"batch row {empty[0]} has no real tokens: attention_mask is 0 everywhere")
    rows = zip(tokens.cpu().numpy(), real.cpu().numpy(), strict=True)
    pieces = [Piece(row, ids[kept], np.arange(kept.sum()), kept.nonzero()[0]) for row, (ids, kept) in enumerate(rows)]
    return Pieces(pieces, ["texts"] * len(pieces))


def run_in_batches(
    model: Transformer,
    pieces: Sequence[Piece],
    run: Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None], Callable[[int, Any], Outcome]],
    progress: bool = False,
) -> Iterator[tuple[Piece, Outcome]]:
    """Every piece in order with what `run` makes of it; `progress` shows a bar that counts tokens.

    `run(tokens, attention_mask)` is given pieces of like length as rows, padded on the right; what it returns is called with the
    number of a row and the piece's own tokens in it, and gives the piece's result.
    """
    with progress_bar(sum(len(piece.tokens) for piece in pieces), "reading", "tok", shown=progress) as bar:
        for group in _groups(pieces, TOKENS_PER_BATCH * BATCHES_AHEAD):
            by_length = sorted(range(len(group)), key=lambda number: len(group[number].tokens))
            results: dict[int, Outcome] = {}
            for numbers in _batches(by_length, group):
                tokens, real = _padded([group[number].tokens for number in numbers], model.cfg.device)
                of_row = run(tokens, real)
                for row, number in enumerate(numbers):
                    results[number] = of_row(row, group[number].own)
                bar.update(sum(len(group[number].tokens) for number in numbers))
            for number, piece in enumerate(group):
                yield piece, results.pop(number)


def _groups(pieces: Iterable[Piece], tokens: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    used = 0
    for piece in pieces:
        group.append(piece)
        used += len(piece.tokens)
        if used >= tokens:
            yield group
            group, used = [], 0
    if group:
        yield group


def _batches(by_length: list[int], group: list[Piece]) -> Iterator[list[int]]:
    """Rows of a batch have, with their padding, no more than `TOKENS_PER_BATCH` tokens, unless one piece alone has more."""
    batch: list[int] = []
    for number in by_length:
        if batch and (len(batch) + 1) * len(group[number].tokens) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _padded(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int64)
    real = np.zeros((len(rows), longest), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
        real[row, : len(ids)] = True
    return torch.from_numpy(tokens).to(device), None if real.all() else torch.from_numpy(real).to(device)
