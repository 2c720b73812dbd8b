"""What removing an expert did to the loss, summarised by layer and slot, by domain, and by the scope of the removal.

Each summary is an accumulator: chunks of the effect table in, a table out.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.accumulators.documents import Documents, sums_from
from hooked_moe.analysis.accumulators.histogram import Histogram
from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.statistics import MINIMUM_PAIRS, DegenerateSample, cluster_bootstrap, clustered_dz_from_sums
from hooked_moe.tables import read_parquet
from hooked_moe.tables.effect_grid import EffectGrid

LAYER_COLUMNS = {
    "layer": ("index", "transformer block, counted from 0"),
    "slot": ("index", "rank of the removed expert by routing weight; -1: all slots together"),
    "n_positions": ("positions", "positions observed"),
    "n_removals": ("removals", "removals measured; the loss columns are over these"),
    "mean_delta": ("nats", "mean delta_loss"),
    "mean_abs_delta": ("nats", "mean |delta_loss|"),
    "p95_abs_delta": ("nats", "95th percentile of |delta_loss|, to 0.05%"),
    "share_positive": ("1", "removals that raise the loss"),
    "share_above_floor": ("1", "removals with |delta_loss| above the noise floor; NaN where that was not measured"),
    "mean_gap_norm": ("residual stream", "mean gap norm g ||E(x)||"),
    "mean_output_norm": ("residual stream", "mean output norm ||E(x)||"),
    "mean_routing_weight": ("1", "mean routing weight as applied"),
}
CENTRE = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
TAIL = np.logspace(0, -4, 41)
_OBSERVED = ("gap_norm", "output_norm", "routing_weight")


class LayerSummary:
    """By layer and slot: layers.csv and slot_distribution.csv."""

    def __init__(self, layers: tuple[int, ...], n_slots: int, noise_floor: float | None = None) -> None:
        """`noise_floor` in nats."""
        self.layers, self.n_slots, self.noise_floor = layers, n_slots, noise_floor
        shape = (len(layers), n_slots)
        self._n_positions = self._n_measured = 0
        self._delta, self._size, self._positive, self._above = (np.zeros(shape) for _ in range(4))
        self._observed = {name: np.zeros(shape) for name in _OBSERVED}
        self._histogram = Histogram(len(layers) * n_slots)

    def update(self, chunk: EffectGrid, measured: EffectGrid) -> None:
        """A chunk, and its measured positions."""
        self._n_positions += len(chunk.document)
        self._n_measured += len(measured.document)
        for name, total in self._observed.items():
            values = getattr(chunk, name)
            total += np.nan if values is None else values.sum(axis=0, dtype=np.float64)
        delta = measured.delta_loss
        size = np.abs(delta)
        self._delta += delta.sum(axis=0, dtype=np.float64)
        self._size += size.sum(axis=0, dtype=np.float64)
        self._positive += (delta > 0).sum(axis=0)
        self._above += np.nan if self.noise_floor is None else (size > self.noise_floor).sum(axis=0)
        groups = np.broadcast_to(np.arange(delta[0].size).reshape(delta.shape[1:]) if len(delta) else 0, delta.shape)
        self._histogram.add(groups.ravel(), delta.ravel())

    def table(self) -> pa.Table:
        """One row per layer and slot, and one per layer with slot -1 for all slots; the columns are those of LAYER_COLUMNS.

        Norms and weights are over all positions, NaN where the table lacks them. Raises ValueError without any removal.
        """
        if not self._n_measured:
            raise ValueError("no position of the effect table has a next token; there is nothing to summarise")
        rows = []
        for axis, layer in enumerate(self.layers):
            for slot in range(-1, self.n_slots):
                slots = list(range(self.n_slots)) if slot < 0 else [slot]
                n = self._n_measured * len(slots)
                groups = [axis * self.n_slots + one for one in slots]

                def mean(totals: np.ndarray, n: int = n, axis: int = axis, slots: list[int] = slots) -> float:
                    return float(totals[axis, slots].sum() / n)

                row = {
                    "layer": layer,
                    "slot": slot,
                    "n_positions": self._n_positions,
                    "n_removals": n,
                    "mean_delta": mean(self._delta),
                    "mean_abs_delta": mean(self._size),
                    "p95_abs_delta": float(self._histogram.magnitude_quantiles(groups, np.array([0.95]))[0]),
                    "share_positive": mean(self._positive),
                    "share_above_floor": mean(self._above),
                    **{f"mean_{name}": mean(total, self._n_positions * len(slots)) for name, total in self._observed.items()},
                }
                rows.append({name: row[name] for name in LAYER_COLUMNS})
        return pa.Table.from_pylist(rows)

    def slot_distribution(self) -> pa.Table:
        """Per slot, over all layers: mean and quantiles of delta_loss, and the |delta_loss| exceeded by a share of removals.

        Columns slot, statistic, level, nats; quantiles to 0.05%. Shares of fewer than five removals are left out.
        """
        rows = []
        n = self._n_measured * len(self.layers)
        shares = TAIL[n * TAIL >= 5]
        for slot in range(self.n_slots):
            groups = [axis * self.n_slots + slot for axis in range(len(self.layers))]
            mean = float(self._delta[:, slot].sum() / n)
            rows.append({"slot": slot, "statistic": "mean", "level": np.nan, "nats": mean})
            for statistic, levels, values in (
                ("quantile of delta", CENTRE, self._histogram.quantiles(groups, CENTRE)),
                ("abs delta exceeded by share", shares, self._histogram.magnitude_quantiles(groups, 1 - shares)),
            ):
                for level, value in zip(levels, values, strict=True):
                    rows.append({"slot": slot, "statistic": statistic, "level": float(level), "nats": float(value)})
        return pa.Table.from_pylist(rows)


class SlotSummary:
    """Mean loss change by weight rank, with intervals over documents: slots.csv."""

    def __init__(self, layers: tuple[int, ...], n_slots: int, documents: Documents) -> None:
        self.layers, self.n_slots, self.documents = layers, n_slots, documents
        self._n = np.zeros(len(documents))
        self._delta = np.zeros((len(documents), len(layers), n_slots))

    def update(self, measured: EffectGrid) -> None:
        here, starts = self.documents.split(measured.document)
        if len(here):
            self._n[here] += sums_from(np.ones(len(measured.document)), starts)
            self._delta[here] += sums_from(measured.delta_loss, starts)

    def table(self) -> pa.Table:
        """layer (-1: all together), slot, n_removals, mean_delta with a 95% interval, bootstrap over documents (nats).

        The interval is NaN with fewer than three documents, and where the means of all documents are equal.
        """
        together = self._delta.sum(axis=1, keepdims=True)
        total = np.concatenate([together / len(self.layers), self._delta], axis=1).reshape(len(self.documents), -1)
        mean, low, high = mean_intervals(total, self._n)
        rows = []
        for number, layer in enumerate((-1, *self.layers)):
            for slot in range(self.n_slots):
                at = number * self.n_slots + slot
                removals = int(self._n.sum()) * (len(self.layers) if layer < 0 else 1)
                row = {"layer": layer, "slot": slot, "n_removals": removals, "mean_delta": mean[at]}
                rows.append({**row, "mean_delta_low": low[at], "mean_delta_high": high[at]})
        return pa.Table.from_pylist(rows)


def mean_intervals(
    total: Float[np.ndarray, "document statistic"], count: Float[np.ndarray, " document"]
) -> tuple[Float[np.ndarray, " statistic"], Float[np.ndarray, " statistic"], Float[np.ndarray, " statistic"]]:
    """Means over observations with 95% intervals by bootstrap over documents, NaN where there is no interval."""
    mean = total.sum(axis=0) / count.sum()
    low, high = np.full(len(mean), np.nan), np.full(len(mean), np.nan)
    residual = total - mean * count[:, None]
    varied = np.abs(residual).max(axis=0) > 1e-9 * np.abs(mean)
    if len(count) >= MINIMUM_PAIRS and varied.any():
        interval = cluster_bootstrap(total[:, varied], count)
        low[varied], high[varied] = interval.low, interval.high
    return mean, low, high


class DomainSummary:
    """By domain: domains.csv."""

    def __init__(self, documents: Documents, run: Path) -> None:
        """Raises ValueError where documents.parquet lacks a document of the effect table."""
        self.documents = documents
        self._tokens = run / "tokens.parquet"
        rows = read_parquet(run / "documents.parquet", ["document", "domain"]).to_pylist()
        self._domain = {row["document"]: row["domain"] for row in rows}
        unknown = sorted(set(documents.ids.tolist()) - set(self._domain))
        if unknown:
            raise ValueError(f"documents.parquet lacks document {unknown[0]} of the effect table ({len(unknown)} lacking)")
        self._sums = np.zeros((len(documents), 5))  # positions, delta, |delta|, contrast, contrast squared

    def update(self, measured: EffectGrid) -> None:
        here, starts = self.documents.split(measured.document)
        if len(here):
            delta = measured.delta_loss.astype(np.float64)
            contrast = (delta[..., 0] - delta[..., -1]).mean(axis=1)
            means = (delta.mean(axis=(1, 2)), np.abs(delta).mean(axis=(1, 2)))
            columns = np.stack([np.ones(len(delta)), *means, contrast, contrast**2], axis=1)
            self._sums[here] += sums_from(columns, starts)

    def table(self) -> pa.Table:
        """Per domain: documents, positions, baseline loss, effect of a removal, and the routing-weight contrast.

        `top_minus_bottom` is delta_loss of slot 0 minus that of the last slot, averaged over layers at each position, in
        nats; `d_position` its ratio to the standard deviation over positions, with a 95% interval clustered by document.
        """
        loss = self._baseline_loss()
        domain = np.array([self._domain[int(one)] for one in self.documents.ids])
        rows = []
        for name in sorted(set(domain.tolist())):
            n, delta, size, contrast, square = self._sums[domain == name].T
            try:
                effect = clustered_dz_from_sums(n, contrast, square)
                d, low, high = effect.d, effect.low, effect.high
            except DegenerateSample:
                d = low = high = np.nan
            rows.append(
                {
                    "domain": name,
                    "n_documents": len(n),
                    "n_positions": int(n.sum()),
                    "baseline_loss": loss.get(name, np.nan),
                    "mean_delta": delta.sum() / n.sum(),
                    "mean_abs_delta": size.sum() / n.sum(),
                    "top_minus_bottom": contrast.sum() / n.sum(),
                    "d_position": d,
                    "d_position_low": low,
                    "d_position_high": high,
                }
            )
        return pa.Table.from_pylist(rows)

    def _baseline_loss(self) -> dict[str, float]:
        """Mean loss of the intact model per domain, in nats, over every token with a next one; empty without tokens.parquet."""
        if not self._tokens.is_file():
            return {}
        count: dict[str, int] = {}
        total: dict[str, float] = {}
        for rows in row_batches(self._tokens, ("document", "target", "baseline_loss")):
            kept = rows["target"] >= 0
            found, index = np.unique(rows["document"][kept], return_inverse=True)
            for one, n, loss in zip(found, np.bincount(index), np.bincount(index, rows["baseline_loss"][kept]), strict=True):
                name = self._domain.get(int(one), "")
                count[name] = count.get(name, 0) + int(n)
                total[name] = total.get(name, 0.0) + float(loss)
        return {name: total[name] / n for name, n in count.items()}


class ScopeSummary:
    """Per layer: removal at the token alone against removal at every token of the sequence, over the same rows: scopes.csv."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self._n = 0
        self._sums = {name: np.zeros(len(layers)) for name in ("size", "size_everywhere", "gap", "same_sign")}
        self._moments = np.zeros((5, len(layers)))  # x, y, x^2, y^2, xy of alone (x) and everywhere (y)

    def update(self, position: EffectGrid, sequence: EffectGrid) -> None:
        """The positions of one chunk that were measured in each scope; those of both are compared."""
        keys = [grid.document.astype(np.int64) << 32 | grid.position for grid in (position, sequence)]
        both = (grid.delta_loss[np.isin(*order)] for grid, order in ((position, keys), (sequence, keys[::-1])))
        x, y = (delta.astype(np.float64) for delta in both)
        self._n += x.shape[0] * x.shape[2]
        sums = (np.abs(x), np.abs(y), np.abs(y - x), np.sign(x) == np.sign(y))
        for total, values in zip(self._sums.values(), sums, strict=True):
            total += values.sum(axis=(0, 2))
        self._moments += [values.sum(axis=(0, 2)) for values in (x, y, x**2, y**2, x * y)]

    def table(self) -> pa.Table:
        """Mean sizes in nats, mean size of the difference, correlation (NaN where either is constant), share of equal signs."""
        x, y, xx, yy, xy = self._moments / self._n
        spread = np.maximum(xx - x**2, 0) * np.maximum(yy - y**2, 0)
        constant = spread <= 1e-24 * xx * yy
        correlation = np.where(constant, np.nan, (xy - x * y) / np.sqrt(np.where(constant, 1.0, spread)))
        means = {name: total / self._n for name, total in self._sums.items()}
        return pa.table(
            {
                "layer": list(self.layers),
                "mean_abs_position": means["size"],
                "mean_abs_sequence": means["size_everywhere"],
                "mean_abs_gap": means["gap"],
                "correlation": correlation,
                "same_sign": means["same_sign"],
            }
        )
