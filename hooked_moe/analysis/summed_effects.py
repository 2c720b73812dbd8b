"""The sums of single-token effects by document, layer and expert, as arrays: what pruning is forecast and chosen by."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from hooked_moe.checks import whole_number, whole_numbers
from hooked_moe.statistics import shrunk_means
from hooked_moe.tables import current_file, read_parquet

SUMS_FILE = "expert_effect_sums.parquet"


def in_half(document: Int[np.ndarray, " n"], half: str | None) -> Bool[np.ndarray, " n"]:
    """Which documents have an even, or an odd, number; all of them for None."""
    if half not in (None, "even", "odd"):
        raise ValueError(f"half must be 'even', 'odd' or None, not {half!r}")
    return np.ones(len(document), bool) if half is None else document % 2 == (half == "odd")


@dataclass(frozen=True)
class SummedEffects:
    """What every expert's removals cost in each document of a run, or of every other one."""

    layers: list[int]
    n_positions: Int[np.ndarray, " document"]
    count: Int[np.ndarray, "document layer expert"]
    total: Float[np.ndarray, "document layer expert"]  # nats
    n_active: int  # experts that a token goes to

    @classmethod
    def read(cls, run: str | os.PathLike[str] | pa.Table, effect: str, half: str | None) -> "SummedEffects":
        """From expert_effect_sums.parquet or the directory of an analysed run.

        Raises ValueError for an effect that it lacks, and for a file that is damaged, or of other tables than the run's.
        """
        table = (
            run if isinstance(run, pa.Table) else read_parquet(current_file(Path(run), SUMS_FILE, "analysing the run writes it"))
        )
        column = f"sum_{effect}"
        if column not in table.column_names:
            raise ValueError(f"this run has not measured {effect!r}; it has {', '.join(_measured(table))}")
        keys = {
            key: table[key].to_numpy().astype(np.int64) for key in ("document", "layer", "expert", "n_positions", "n_removals")
        }
        documents, row = np.unique(keys["document"], return_inverse=True)
        layers, axis = np.unique(keys["layer"], return_inverse=True)
        shape = (len(documents), len(layers), _n_experts(table))
        at = np.ravel_multi_index((row, axis, keys["expert"]), shape)
        count = np.bincount(at, keys["n_removals"], int(np.prod(shape))).reshape(shape).astype(np.int64)
        total = np.bincount(at, table[column].to_numpy(), int(np.prod(shape))).reshape(shape)
        positions = np.zeros(len(documents), np.int64)
        positions[row] = keys["n_positions"]
        kept = in_half(documents, half)
        active = int(count[:, 0].sum() // max(1, positions.sum()))
        return cls(layers.tolist(), positions[kept], count[kept], total[kept], active)

    def axis(self, layer: int) -> int:
        layer = whole_number(layer, "a layer")
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not measured; the run has {self.layers}")
        return self.layers.index(layer)

    def checked(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The experts. Raises ValueError for one that does not exist, or is named twice."""
        n_experts = self.total.shape[2]
        removed = whole_numbers(experts, f"the experts of layer {layer}", n_experts)
        wrong = [expert for expert in removed if not 0 <= expert < n_experts]
        if wrong or len(set(removed)) != len(removed):
            fault = f"expert {wrong[0]} outside 0..{n_experts - 1}" if wrong else "an expert twice"
            raise ValueError(f"layer {layer} names {fault}")
        return removed

    def means(self, axis: int) -> Float[np.ndarray, " expert"]:
        """Nats per removal of each expert of a layer, shrunk; the mean of all where it is never active."""
        return shrunk_means(self.total[:, axis], self.count[:, axis]).mean

    def cost(self, axis: int) -> Float[np.ndarray, " expert"]:
        """Nats per token that each expert of a layer costs: 0 where it is never active."""
        return self.means(axis) * self.count[:, axis].sum(axis=0) / self.n_positions.sum()


def _n_experts(table: pa.Table) -> int:
    """As many as the model has, which the table's metadata says: an expert that is never active has no row."""
    return int((table.schema.metadata or {})[b"n_experts"])


def _measured(table: pa.Table) -> list[str]:
    return [name.removeprefix("sum_") for name in table.column_names if name.startswith("sum_")]
