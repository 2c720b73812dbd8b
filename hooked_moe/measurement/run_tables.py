"""The files of a run: those of its parts, and the tables that take no measurement (documents, texts, weights, draw)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.draw import Draw
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.part_spec import Part
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import write_parquet_atomic
from hooked_moe.transformer import Transformer

_DOCUMENTS, _WEIGHTS, _TEXTS, _DRAW = "documents.parquet", "expert_weights.parquet", "token_texts.parquet", "draw.parquet"
BESIDE: dict[Part, tuple[str, ...]] = {
    "position": (_DOCUMENTS, _WEIGHTS, _TEXTS),
    "sequence": (_DOCUMENTS,),
    "progressive": (_DOCUMENTS,),
    "estimates": (_DOCUMENTS, _WEIGHTS, _TEXTS),
    "sampled": (_DRAW,),
}
"""What is written beside the tables of each part."""


def tables_of(part: Part) -> list[str]:
    """The files of a part, which are measured."""
    return [f"{name}.parquet" for name in TABLES[part]]


@dataclass(frozen=True)
class RunTables:
    """What these tables are made of."""

    directory: Path
    model: Transformer
    tokenized: TokenizedCorpus
    layers: tuple[int, ...]

    def have_weights(self, part: Part) -> bool:
        """Whether the weights of experts are among the tables of a part."""
        return _WEIGHTS in BESIDE[part]

    def write(self, part: Part, drawn: Callable[[], Draw], weights: pa.Table | None = None) -> None:
        """Those beside a part. `drawn` says what a budgeted run has drawn; `weights` is the experts' table, if there is one."""
        tables: dict[str, Callable[[], pa.Table]] = {
            _DOCUMENTS: self.tokenized.table,
            _WEIGHTS: lambda: expert_weights(self.model, self.layers) if weights is None else weights,
            _TEXTS: self.tokenized.token_texts,
            _DRAW: lambda: drawn().table(),
        }
        for name in BESIDE[part]:
            write_parquet_atomic(tables[name](), self.directory / name)
