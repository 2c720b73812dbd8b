"""effects.parquet of a run, read one document at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow.compute as pc
import pyarrow.parquet as pq

from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks

_KEYS = ("document", "position", "layer", "slot")


class EffectFile:
    """The effect table, open: `document` reads the row groups in which a document is, and no others."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        self._columns = [name for name in (*_KEYS, *columns) if name in self._file.schema_arrow.names]
        self._wanted = tuple(columns)
        self._groups: dict[int, list[int]] = defaultdict(list)
        self._unknown: list[int] = []
        place = self._file.schema_arrow.get_field_index("document")
        for group in range(self._file.num_row_groups):
            statistics = self._file.metadata.row_group(group).column(place).statistics
            if statistics is None or not statistics.has_min_max:
                self._unknown.append(group)
                continue
            for document in range(statistics.min, statistics.max + 1):
                self._groups[document].append(group)

    def __enter__(self) -> EffectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def document(self, number: int, n_tokens: int) -> EffectGrid | None:
        """The first positions of a document; None where the table has none of it. Raises ValueError as `effect_chunks` does."""
        groups = sorted([*self._groups.get(number, ()), *self._unknown])
        table = self._file.read_row_groups(groups, columns=self._columns, use_threads=False)
        rows = pc.and_(pc.equal(table["document"], number), pc.less(table["position"], n_tokens))
        table = table.filter(rows)
        if not table.num_rows:
            return None
        return next(iter(effect_chunks(table.combine_chunks(), self._wanted, rows=table.num_rows + 1)))
