"""Observational criteria: what is said about an expert without removing it.

Each criterion is one number per routed expert, taken over the real tokens of a corpus (padding never enters), and is a
function of a few streaming moments. `CRITERIA` is the table of them; add a row there to audit one more.

Notation: `S_e` the tokens that select expert e, `T` all tokens, `g_e(t)` the routing weight as applied, `E_e(x_t)` the
expert's output before weighting. Definitions follow arXiv 2606.10703, section 3, as stated in its text.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from hooked_moe.effect_grid import column_values


@dataclass(frozen=True)
class ExpertMoments:
    """What the criteria are computed from. An expert that no token selects has n_tokens 0, means NaN and M2 0."""

    n_tokens: Int[np.ndarray, "layer expert"]  # |S_e|
    corpus_tokens: Int[np.ndarray, " layer"]  # T
    mean_weight: Float[np.ndarray, "layer expert"]  # mean of g_e over S_e
    mean_norm: Float[np.ndarray, "layer expert"]  # mean of ||E_e|| over S_e
    m2_norm: Float[np.ndarray, "layer expert"]  # sum over S_e of (||E_e|| - mean_norm)^2


@dataclass(frozen=True)
class Criterion:
    name: str
    label: str
    formula: str
    unit: str
    source: str
    compute: Callable[[ExpertMoments], Float[np.ndarray, "layer expert"]]


def utilization_rate(moments: ExpertMoments) -> Float[np.ndarray, "layer expert"]:
    """|S_e| / T: the fraction of tokens that select the expert. Sums to k over a layer's experts."""
    return moments.n_tokens / moments.corpus_tokens[:, None]


def activation_norm(moments: ExpertMoments) -> Float[np.ndarray, "layer expert"]:
    """Mean of ||E_e(x_t)|| over S_e. NaN for an expert never selected."""
    return moments.mean_norm


def mean_routing_weight_when_active(moments: ExpertMoments) -> Float[np.ndarray, "layer expert"]:
    """Mean of g_e(t) over S_e. NaN for an expert never selected."""
    return moments.mean_weight


def activation_std(moments: ExpertMoments) -> Float[np.ndarray, "layer expert"]:
    """Standard deviation (ddof=1) of ||E_e(x_t)|| over S_e. NaN for an expert selected fewer than two times."""
    n = moments.n_tokens
    return np.sqrt(np.divide(moments.m2_norm, n - 1, out=np.full(n.shape, np.nan), where=n > 1))


_PAPER = "arXiv 2606.10703, section 3"
CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("utilization_rate", "utilization rate", "|S_e| / T", "1", _PAPER, utilization_rate),
        Criterion(
            "activation_norm",
            "activation norm",
            "mean over S_e of ||E_e(x_t)||",
            "residual stream",
            _PAPER,
            activation_norm,
        ),
        Criterion(
            "mean_routing_weight_when_active",
            "mean routing weight when active",
            "mean over S_e of g_e(t)",
            "1",
            _PAPER,
            mean_routing_weight_when_active,
        ),
        Criterion(
            "activation_std",
            "activation std",
            "std (ddof=1) over S_e of ||E_e(x_t)||",
            "residual stream",
            _PAPER,
            activation_std,
        ),
    )
}


class CriteriaAccumulator:
    """Streaming moments of every expert in `layers`; memory does not depend on how many tokens pass.

    Each batch is reduced with a two-pass mean and sum of squares in float64, and merged by Chan's update, so the result
    does not depend (beyond rounding) on how the rows were cut into batches. A token is counted once per layer, by its
    slot-0 row; a batch may therefore end in the middle of a token.
    """

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        if n_experts < 1 or len(layers) == 0 or len(set(layers)) != len(layers):
            raise ValueError(f"need distinct layers and at least one expert, got layers {layers}, {n_experts} experts")
        self.layers = tuple(sorted(int(layer) for layer in layers))
        self.n_experts = n_experts
        shape = (len(self.layers), n_experts)
        self._n = np.zeros(shape, np.int64)
        self._corpus_tokens = np.zeros(len(self.layers), np.int64)
        self._mean_weight = np.zeros(shape)
        self._mean_norm = np.zeros(shape)
        self._m2_norm = np.zeros(shape)

    def update(
        self,
        layer: Int[np.ndarray, " rows"],
        slot: Int[np.ndarray, " rows"],
        expert: Int[np.ndarray, " rows"],
        routing_weight: Float[np.ndarray, " rows"],
        output_norm: Float[np.ndarray, " rows"],
    ) -> None:
        """Add one row per (token, layer, slot), in any order. Layers that this accumulator does not have are passed over.

        Raises ValueError for arrays of unequal length, an expert outside [0, n_experts), and values that are not finite.
        """
        columns = {"layer": layer, "slot": slot, "expert": expert, "weight": routing_weight, "norm": output_norm}
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"columns differ in length: { {name: len(column) for name, column in columns.items()} }")
        axis = np.searchsorted(self.layers, layer).clip(max=len(self.layers) - 1)
        known = np.asarray(self.layers)[axis] == layer
        axis, slot, expert = axis[known], np.asarray(slot)[known], np.asarray(expert)[known].astype(np.int64)
        weight = np.asarray(routing_weight)[known].astype(np.float64)
        norm = np.asarray(output_norm)[known].astype(np.float64)
        if len(expert) == 0:
            return
        if expert.min() < 0 or expert.max() >= self.n_experts:
            raise ValueError(f"expert {expert.max() if expert.min() >= 0 else expert.min()} outside 0..{self.n_experts - 1}")
        for name, values in (("routing_weight", weight), ("output_norm", norm)):
            if not np.isfinite(values).all():
                raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite")

        key = axis * self.n_experts + expert
        size, shape = len(self.layers) * self.n_experts, self._n.shape
        n = np.bincount(key, minlength=size)
        divisor = np.maximum(n, 1)
        mean_weight = np.bincount(key, weight, size) / divisor
        mean_norm = np.bincount(key, norm, size) / divisor
        m2_norm = np.bincount(key, (norm - mean_norm[key]) ** 2, size)
        tokens = np.bincount(axis[slot == 0], minlength=len(self.layers))
        self._combine(n.reshape(shape), mean_weight.reshape(shape), mean_norm.reshape(shape), m2_norm.reshape(shape), tokens)

    def update_table(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Add the rows of a piece of an effect table."""
        names = ("layer", "slot", "expert", "routing_weight", "output_norm")
        self.update(*(column_values(batch, name) for name in names))

    def merge(self, other: "CriteriaAccumulator") -> None:
        """Add what another accumulator over the same layers and experts has seen (say, of another shard)."""
        if (self.layers, self.n_experts) != (other.layers, other.n_experts):
            raise ValueError(
                f"accumulators differ: layers {self.layers} and {other.layers}, experts {self.n_experts} and {other.n_experts}"
            )
        self._combine(other._n, other._mean_weight, other._mean_norm, other._m2_norm, other._corpus_tokens)

    def _combine(
        self,
        n: Int[np.ndarray, "layer expert"],
        mean_weight: Float[np.ndarray, "layer expert"],
        mean_norm: Float[np.ndarray, "layer expert"],
        m2_norm: Float[np.ndarray, "layer expert"],
        tokens: Int[np.ndarray, " layer"],
    ) -> None:
        """Chan, Golub and LeVeque (1979), equations 2.1: pairwise combination of means and sums of squares."""
        total = self._n + n
        share = n / np.maximum(total, 1)
        shift = mean_norm - self._mean_norm
        self._m2_norm = self._m2_norm + m2_norm + shift**2 * self._n * share
        self._mean_norm = self._mean_norm + shift * share
        self._mean_weight = self._mean_weight + (mean_weight - self._mean_weight) * share
        self._n = total
        self._corpus_tokens = self._corpus_tokens + tokens

    def moments(self) -> ExpertMoments:
        """The moments so far. Raises ValueError where a layer has seen no token."""
        empty = [layer for layer, tokens in zip(self.layers, self._corpus_tokens, strict=True) if tokens == 0]
        if empty:
            raise ValueError(f"no token seen in layers {empty}")
        never = self._n == 0
        return ExpertMoments(
            self._n.copy(),
            self._corpus_tokens.copy(),
            np.where(never, np.nan, self._mean_weight),
            np.where(never, np.nan, self._mean_norm),
            self._m2_norm.copy(),
        )

    def table(self) -> pa.Table:
        """One row per layer and expert: layer, expert, n_tokens (selections), then a column per criterion."""
        moments = self.moments()
        shape = moments.n_tokens.shape
        columns = {
            "layer": np.repeat(np.asarray(self.layers, np.int16), self.n_experts),
            "expert": np.tile(np.arange(self.n_experts, dtype=np.int16), shape[0]),
            "n_tokens": moments.n_tokens.ravel(),
            **{name: criterion.compute(moments).ravel() for name, criterion in CRITERIA.items()},
        }
        meanings = {
            "layer": ("transformer block, counted from 0", "index"),
            "expert": ("routed expert, counted from 0", "index"),
            "n_tokens": ("real tokens that select the expert", "tokens"),
            **{name: (criterion.formula, criterion.unit) for name, criterion in CRITERIA.items()},
        }
        arrays = {name: pa.array(values) for name, values in columns.items()}
        fields = [
            pa.field(name, array.type, metadata=dict(zip(("meaning", "unit"), meanings[name], strict=True)))
            for name, array in arrays.items()
        ]
        return pa.table(arrays, schema=pa.schema(fields))


def expert_criteria(
    effects: pa.Table | str | os.PathLike[str], *, n_experts: int, layers: Sequence[int] | None = None
) -> pa.Table:
    """The criteria of every expert over all rows of an effect table, `CriteriaAccumulator.table()`.

    The rows are streamed; `layers` defaults to those of the first 65,536 rows, which hold at least one whole token of
    any model there is. Rows without delta_loss (a document's last token) count: their token was routed like any other.
    """
    if isinstance(effects, pa.Table):
        batches = iter(effects.to_batches(max_chunksize=1 << 18))
    else:
        names = ["layer", "slot", "expert", "routing_weight", "output_norm"]
        batches = pq.ParquetFile(effects).iter_batches(batch_size=1 << 18, columns=names, use_threads=False)
    accumulator = None
    for batch in batches:
        if accumulator is None:
            found = np.unique(column_values(batch, "layer")) if layers is None else layers
            accumulator = CriteriaAccumulator([int(layer) for layer in found], n_experts)
        accumulator.update_table(batch)
    if accumulator is None:
        raise ValueError("the effect table has no rows")
    return accumulator.table()
