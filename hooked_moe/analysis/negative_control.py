"""A run in which no ranking can know anything: the effects of each position dealt to its active experts at random."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hooked_moe.tables import required_file, write_parquet_atomic
from hooked_moe.tables.schemas import EFFECTS

_SHUFFLED = ("delta_loss", "kl")
_UNCHANGED = ("documents.parquet", "routing.parquet", "expert_weights.parquet")


def shuffle_experts(run: Path, out: Path, seed: int = 0) -> None:
    """Write the measured tables of a run to `out`, with the realised and the expected effect of every position's active experts
    exchanged among them; analyse `out` next.

    Sizes stay what they are, and so do all statistics of experts. What is asked of a ranking then has only one honest answer:
    savings, rank correlations and d are 0 in expectation, and the top slot holds 1 / k of the effects. Raises FileNotFoundError
    for a run that was not measured, and ValueError for a table that is no full grid.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in _UNCHANGED:
        shutil.copyfile(required_file(run, name, "measuring the run writes it"), out / name)
    table = pq.read_table(required_file(run, "effects.parquet", "measuring the run writes it"), use_threads=False)
    k = int(table["slot"].to_numpy().max()) + 1
    if table.num_rows % k or not np.array_equal(
        table["slot"].to_numpy().reshape(-1, k), np.tile(np.arange(k), (table.num_rows // k, 1))
    ):
        raise ValueError(f"{run / 'effects.parquet'} is no full grid of {k} experts at every position and layer")
    order = np.random.default_rng(seed).random((table.num_rows // k, k)).argsort(axis=1)
    for name in _SHUFFLED:
        values = np.take_along_axis(table[name].to_numpy().reshape(-1, k), order, axis=1).ravel()
        table = table.set_column(table.column_names.index(name), EFFECTS.field(name), pa.array(values, EFFECTS.field(name).type))
    write_parquet_atomic(table, out / "effects.parquet")
