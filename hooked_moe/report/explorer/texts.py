"""The texts of a run's documents, token by token, from its tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from hooked_moe.tables import read_parquet, required_file

_ORIGIN = "the measurement writes it: `hooked-moe audit` with the settings of this run adds it"


@dataclass(frozen=True)
class Texts:
    """What documents say. The tokens of all documents follow each other; document number i has those from starts[i] on."""

    names: list[str]
    domains: list[str]
    starts: Int[np.ndarray, " document_and_end"]
    _tokens: pa.Array

    def of(self, document: int, begin: int = 0, end: int | None = None) -> list[str]:
        """The tokens of a document from one position to another."""
        start, stop = (int(at) for at in self.starts[document : document + 2])
        first, last = start + max(0, begin), stop if end is None else min(stop, start + end)
        return self._tokens.slice(first, max(0, last - first)).to_pylist()

    def at(self, place: int) -> str:
        """A token by its place among those of all documents."""
        return self._tokens[place].as_py()

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return int(self.starts[document + 1] - self.starts[document])

    def __len__(self) -> int:
        return len(self.names)


def read_texts(run: Path) -> Texts:
    """The texts of a run. Raises FileNotFoundError where it has none, ValueError where tokens are missing."""
    documents = read_parquet(required_file(run, "documents.parquet", _ORIGIN)).sort_by("document").to_pylist()
    rows = read_parquet(required_file(run, "token_texts.parquet", _ORIGIN))
    lengths = [row["n_tokens"] for row in documents]
    if [row["document"] for row in documents] != list(range(len(documents))) or sum(lengths) != rows.num_rows:
        raise ValueError(f"{run}: token_texts.parquet does not have the tokens of documents.parquet; they are of other runs")
    names = [row["title"] or row["id"] for row in documents]
    tokens = rows["text"].cast(pa.large_string()).combine_chunks()  # Arrow's, for a large corpus is many texts
    return Texts(names, [row["domain"] for row in documents], np.cumsum([0, *lengths]), tokens)
