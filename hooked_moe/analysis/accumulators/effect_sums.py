"""What every expert's removals cost in each document: the sums from which means, oracles and forecasts of pruning are made."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from hooked_moe.tables.effect_grid import EffectGrid

EFFECTS = ("delta_loss", "kl")
"""What a removal does: to the loss of the token that followed (realised), and to the loss expected of the model's own next
token."""


def effect_columns(measured: EffectGrid) -> dict[str, Float[np.ndarray, "P L K"]]:
    """The effects that a chunk has, by name; `kl` is absent from tables of before it was measured."""
    values = {name: getattr(measured, name) for name in EFFECTS}
    return {name: array for name, array in values.items() if array is not None}


class ExpertEffectSums:
    """Number of removals, and sums of each effect, by document, layer and expert.

    Memory is documents x layers x experts x 24 bytes, whatever the length of the documents.
    """

    def __init__(self, layers: tuple[int, ...], n_experts: int) -> None:
        self.layers, self.n_experts = layers, n_experts
        self._documents: list[int] = []
        self._positions: list[int] = []
        self._counts: list[np.ndarray] = []  # [layer, expert] of each document
        self._sums: dict[str, list[np.ndarray]] = {}

    def update(self, measured: EffectGrid) -> None:
        """Add a chunk's measured positions. A document may continue in the next chunk."""
        if not len(measured.document):
            return
        ids, index = np.unique(measured.document, return_inverse=True)
        axes = [measured.layer_axis(layer) for layer in self.layers]
        shape = (len(ids), len(axes), self.n_experts)
        expert = measured.expert[:, axes].astype(np.int64)
        key = ((index[:, None, None] * shape[1] + np.arange(shape[1])[:, None]) * shape[2] + expert).ravel()
        n = np.bincount(key, minlength=int(np.prod(shape))).reshape(shape)
        sums = {
            name: np.bincount(key, values[:, axes].ravel(), n.size).reshape(shape)
            for name, values in effect_columns(measured).items()
        }
        positions = np.bincount(index)
        for number, document in enumerate(ids.tolist()):
            if self._documents and self._documents[-1] == document:
                self._positions[-1] += int(positions[number])
                self._counts[-1] += n[number]
                for name, values in sums.items():
                    self._sums[name][-1] += values[number]
                continue
            self._documents.append(document)
            self._positions.append(int(positions[number]))
            self._counts.append(n[number])
            for name, values in sums.items():
                self._sums.setdefault(name, []).append(values[number])

    @property
    def effects(self) -> tuple[str, ...]:
        """Those measured; both but for tables of before `kl` was."""
        return tuple(self._sums)

    def documents(self) -> Int[np.ndarray, " document"]:
        return np.array(self._documents, np.int64)

    def n_positions(self) -> Int[np.ndarray, " document"]:
        return np.array(self._positions, np.int64)

    def counts(self) -> Int[np.ndarray, "document layer expert"]:
        return np.array(self._counts, np.int64).reshape(-1, len(self.layers), self.n_experts)

    def sums(self, effect: str) -> Float[np.ndarray, "document layer expert"]:
        """In nats."""
        return np.array(self._sums.get(effect, []), np.float64).reshape(-1, len(self.layers), self.n_experts)

    def mean_delta(self) -> dict[str, np.ndarray]:
        """n_removals, mean_delta and mean_delta_se (nats) of each expert, by layer.

        The error is clustered by document. NaN where an expert was never removed, the error also where in one document only.
        """
        count, total = self.counts(), self.sums("delta_loss")
        n, documents = count.sum(axis=0), (count > 0).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total.sum(axis=0) / n
            residual = np.square(total - np.where(n > 0, mean, 0.0) * count).sum(axis=0)
            error = np.sqrt(residual * documents / (documents - 1)) / n
        error[documents < 2] = np.nan
        return {"n_removals": n.ravel(), "mean_delta": mean.ravel(), "mean_delta_se": error.ravel()}

    def table(self) -> pa.Table:
        """One row per document, layer and expert that was removed there; the columns are those of EFFECT_SUMS.

        The schema's metadata has the number of experts.
        """
        count = self.counts()
        document, layer, expert = np.nonzero(count)
        columns = {
            "document": self.documents()[document],
            "layer": np.asarray(self.layers)[layer],
            "expert": expert,
            "n_positions": self.n_positions()[document],
            "n_removals": count[document, layer, expert],
            **{f"sum_{name}": self.sums(name)[document, layer, expert] for name in self.effects},
        }
        names = [field for field in EFFECT_SUMS if field.name in columns]
        schema = pa.schema(names, metadata={"n_experts": str(self.n_experts)})  # those never active have no row
        return pa.table([columns[field.name].astype(field.type.to_pandas_dtype()) for field in schema], schema=schema)


EFFECT_SUMS = pa.schema(
    [
        pa.field(name, kind, metadata={"meaning": meaning, "unit": unit})
        for name, kind, unit, meaning in (
            ("document", pa.int32(), "index", "document of the corpus, counted from 0"),
            ("layer", pa.int16(), "index", "transformer block, counted from 0"),
            ("expert", pa.int16(), "index", "routed expert, counted from 0"),
            ("n_positions", pa.int64(), "positions", "measured positions of the document"),
            ("n_removals", pa.int64(), "removals", "those of them where the expert was active, and removed"),
            ("sum_delta_loss", pa.float64(), "nats", "sum of delta_loss over these"),
            ("sum_kl", pa.float64(), "nats", "sum of kl over these; the column is absent where that was not measured"),
        )
    ]
)
