"""A corpus as a model reads it: tokens, cut into windows that fit its context."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import pyarrow as pa

from hooked_moe.checks import WrongTypeError, described, whole_number
from hooked_moe.corpus import Corpus, Window, tokenize_documents
from hooked_moe.inputs import foreign_tokenizer
from hooked_moe.tables import DOCUMENTS, TOKEN_TEXTS, table_with_schema
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.transformer import Transformer

DocumentPositions = frozenset[tuple[int, int]]
"""(document, position) pairs."""


class TokenizedCorpus:
    """A corpus in windows of the model's context. The last token of a window is the first of the next, which predicts from it.

    Where there is a BOS token, every window begins with it. It belongs to no document: positions, lengths and all statistics
    count the documents' own tokens.
    """

    def __init__(
        self, model: Transformer, corpus: Corpus, n_ctx: int, limit: int | None = None, prepend_bos: bool | None = None
    ) -> None:
        """`limit` keeps the first `limit` tokens of each document, a BOS token counted. `prepend_bos` None does as the
        checkpoint's own tokenizer does.

        Raises `ValueError` without a tokenizer, with one that the model has no embeddings for, with documents that are empty,
        and for a BOS token that the model does not have.
        """
        if not isinstance(corpus, Corpus):
            raise WrongTypeError(f"expected a corpus, as load_corpus() gives, not {described(corpus)}")
        if model.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot read a corpus: put its tokenizer.json beside its weights")
        self._tokenizer = model.tokenizer
        encode = model.tokenizer.encode
        self.corpus = corpus
        self.n_ctx = n_ctx = whole_number(n_ctx, "n_ctx")
        self.limit = limit = None if limit is None else whole_number(limit, "limit")
        self.bos = _bos(model.tokenizer, prepend_bos)
        kept = limit if limit is None or self.bos is None else limit - 1
        windows = tokenize_documents(corpus.documents, lambda text: encode(text, prepend_bos=False)[:kept], n_ctx, self.bos)
        highest = max(int(window.tokens.max()) for window in windows)
        if highest >= model.cfg.d_vocab:
            raise ValueError(foreign_tokenizer(highest, model.cfg))
        by_document: dict[int, list[Window]] = defaultdict(list)
        for window in windows:
            by_document[window.document].append(window)
        self.documents = [by_document[index] for index in range(len(corpus.documents))]

    @property
    def first(self) -> int:
        """Where a window's own tokens begin: after the BOS token, where there is one."""
        return 0 if self.bos is None else 1

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [windows[-1].start + len(windows[-1].tokens) - self.first for windows in self.documents]

    def sha256(self) -> str:
        """A checksum of every window's document, start and tokens: the same text in other tokens is another corpus."""
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
        return table_with_schema(DOCUMENTS, columns)

    def token_texts(self) -> pa.Table:
        """One row per token, as in `tables.TOKEN_TEXTS`: what a reader of results needs no tokenizer for."""
        texts = [self._tokenizer.to_str_tokens(ids.tolist()) for ids in map(self._own_tokens, self.documents)]
        lengths = [len(pieces) for pieces in texts]
        columns = {
            "document": np.repeat(np.arange(len(texts)), lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
            "text": [text for pieces in texts for text in pieces],
        }
        return table_with_schema(TOKEN_TEXTS, columns)

    def _own_tokens(self, windows: list[Window]) -> np.ndarray:
        """The tokens of a document: each window's own, without the last one, with which the next begins."""
        parts = [window.tokens[self.first : -1] for window in windows[:-1]]
        return np.concatenate([*parts, windows[-1].tokens[self.first :]])


def _bos(tokenizer: Tokenizer, prepend: bool | None) -> int | None:
    """The token to put before every window, if any."""
    if prepend is None:
        ids = tokenizer.encode("a")
        prepend = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    if prepend and tokenizer.bos_id is None:
        raise ValueError("this model has no BOS token to put before a text; leave BOS out")
    return tokenizer.bos_id if prepend else None
