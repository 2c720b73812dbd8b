"""Streaming statistics of each expert, from which the observational criteria are computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.tables.effect_grid import EffectGrid, TableOrPath


@dataclass(frozen=True)
class ExpertStatistics:
    """What is known of each expert. Means over an expert's tokens are NaN where none selects it; what a run has not measured is
    NaN throughout."""

    layers: tuple[int, ...]
    n_tokens: Int[np.ndarray, "layer expert"]  # |S_e|
    corpus_tokens: Int[np.ndarray, " layer"]  # T
    mean_weight: Float[np.ndarray, "layer expert"]  # of g_e over S_e
    mean_norm: Float[np.ndarray, "layer expert"]  # of ||E_e|| over S_e
    m2_norm: Float[np.ndarray, "layer expert"]  # sum over S_e of (||E_e|| - mean_norm)^2
    mean_gap: Float[np.ndarray, "layer expert"]  # of g_e ||E_e|| over S_e
    coactivations: Int[np.ndarray, "layer expert expert"]  # tokens that select both; 0 on the diagonal
    # from routing.parquet
    mean_probability: Float[np.ndarray, "layer expert"]  # of the router's softmax over T
    mean_entropy: Float[np.ndarray, "layer expert"]  # of the router's softmax over S_e, nats
    max_activation: Float[np.ndarray, "layer expert"]  # largest |coordinate| of E_e over S_e
    # from expert_weights.parquet
    router_row_norm: Float[np.ndarray, "layer expert"]
    weight_norm: Float[np.ndarray, "layer expert"]
    mean_abs_weight: Float[np.ndarray, "layer expert"]
    rms_weight: Float[np.ndarray, "layer expert"]


class ExpertAccumulator:
    """Streaming moments of every expert in `layers`; memory does not depend on how many tokens pass.

    Each chunk is reduced with a two-pass mean and sum of squares in float64, and merged by Chan's update, so the result does not
    depend (beyond rounding) on where the table was cut into chunks.
    """

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        if n_experts < 1 or len(layers) == 0 or len(set(layers)) != len(layers):
            raise ValueError(f"need distinct layers and at least one expert, got layers {layers}, {n_experts} experts")
        self.layers = tuple(sorted(int(layer) for layer in layers))
        self.n_experts = n_experts
        shape = (len(self.layers), n_experts)
        self._n = np.zeros(shape, np.int64)
        self._tokens = 0
        self._mean_weight, self._mean_norm, self._m2_norm, self._mean_gap = (np.zeros(shape) for _ in range(4))
        self._coactivations = np.zeros((*shape, n_experts), np.int64)

    def update(self, chunk: EffectGrid) -> None:
        """Add a chunk of the effect table with its routing_weight and output_norm; layers not asked for are passed over.

        Raises ValueError for an expert outside [0, n_experts), absent columns and values that are not finite.
        """
        weights, norms = chunk.routing_weight, chunk.output_norm
        if weights is None or norms is None:
            raise ValueError("the effect table lacks routing_weight or output_norm, which the criteria are computed from")
        for number, layer in enumerate(self.layers):
            axis = chunk.layer_axis(layer)
            expert = chunk.expert[:, axis].astype(np.int64)
            if expert.min() < 0 or expert.max() >= self.n_experts:
                wrong = expert.max() if expert.min() >= 0 else expert.min()
                raise ValueError(f"expert {wrong} outside 0..{self.n_experts - 1}, those of the model")
            weight, norm = (values[:, axis].astype(np.float64) for values in (weights, norms))
            for name, values in (("routing_weight", weight), ("output_norm", norm)):
                if not np.isfinite(values).all():
                    raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite")
            self._add_moments(number, expert.ravel(), weight.ravel(), norm.ravel())
            self._add_coactivations(number, expert)
        self._tokens += len(chunk.document)

    def _add_moments(
        self,
        layer: int,
        expert: Int[np.ndarray, " rows"],
        weight: Float[np.ndarray, " rows"],
        norm: Float[np.ndarray, " rows"],
    ) -> None:
        """Chan, Golub and LeVeque (1979), equations 2.1: pairwise combination of means and sums of squares."""
        n = np.bincount(expert, minlength=self.n_experts)
        divisor = np.maximum(n, 1)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.bincount(expert, values, self.n_experts) / divisor

        mean_norm = mean(norm)
        m2_norm = np.bincount(expert, (norm - mean_norm[expert]) ** 2, self.n_experts)
        before = self._n[layer]
        share = n / np.maximum(before + n, 1)
        shift = mean_norm - self._mean_norm[layer]
        self._m2_norm[layer] += m2_norm + shift**2 * before * share
        self._mean_norm[layer] += shift * share
        self._mean_weight[layer] += (mean(weight) - self._mean_weight[layer]) * share
        self._mean_gap[layer] += (mean(weight * norm) - self._mean_gap[layer]) * share
        self._n[layer] += n

    def _add_coactivations(self, layer: int, expert: Int[np.ndarray, "P K"]) -> None:
        size = self.n_experts**2
        counts = self._coactivations[layer].reshape(-1)
        for slot in range(expert.shape[1]):
            for other in range(slot):
                counts += np.bincount(expert[:, slot] * self.n_experts + expert[:, other], minlength=size)

    def statistics(self, routing: TableOrPath | None = None, expert_weights: TableOrPath | None = None) -> ExpertStatistics:
        """The statistics so far, with those of routing.parquet and expert_weights.parquet where they are given.

        Raises ValueError where no token was seen, and where these tables are of another measurement.
        """
        if self._tokens == 0:
            raise ValueError(f"no token seen in layers {list(self.layers)}")
        never = self._n == 0
        probability, entropy, highest = self._routing(routing)
        row_norm, weight_norm, mean_abs, rms = self._weights(expert_weights)
        return ExpertStatistics(
            layers=self.layers,
            n_tokens=self._n.copy(),
            corpus_tokens=np.full(len(self.layers), self._tokens),
            mean_weight=np.where(never, np.nan, self._mean_weight),
            mean_norm=np.where(never, np.nan, self._mean_norm),
            m2_norm=self._m2_norm.copy(),
            mean_gap=np.where(never, np.nan, self._mean_gap),
            coactivations=self._coactivations + self._coactivations.transpose(0, 2, 1),
            mean_probability=probability,
            mean_entropy=entropy,
            max_activation=highest,
            router_row_norm=row_norm,
            weight_norm=weight_norm,
            mean_abs_weight=mean_abs,
            rms_weight=rms,
        )

    def _routing(self, source: TableOrPath | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean probability, mean entropy and maximal activation, from one row per document, layer and expert."""
        if source is None:
            unmeasured = np.full(self._n.shape, np.nan)
            return unmeasured, unmeasured, unmeasured
        size = self._n.size
        names = ("n_tokens", "document_tokens", "sum_probability", "sum_entropy")
        totals = {name: np.zeros(size) for name in names}
        highest = np.full(size, -np.inf)
        for rows in row_batches(source, ("layer", "expert", *names, "max_activation")):
            key, known = self._key(rows)
            for name, total in totals.items():
                total += np.bincount(key, rows[name][known], size)
            np.fmax.at(highest, key, rows["max_activation"][known].astype(np.float64))
        n_tokens, tokens, probability, entropy = (total.reshape(self._n.shape) for total in totals.values())
        if not np.array_equal(n_tokens, self._n):
            raise ValueError(
                f"routing.parquet counts {n_tokens.sum():.0f} selections and effects.parquet {self._n.sum()}, not the same of "
                "each expert: they are not of one measurement"
            )
        never = self._n == 0
        mean_entropy = np.divide(entropy, n_tokens, out=np.full(never.shape, np.nan), where=~never)
        return probability / tokens, mean_entropy, np.where(never, np.nan, highest.reshape(never.shape))

    def _weights(self, source: TableOrPath | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Router-row norm, weight norm, mean |w| and rms w, from one row per layer and expert."""
        names = ("router_row_norm", "weight_norm", "mean_abs_weight", "rms_weight")
        values = {name: np.full(self._n.size, np.nan) for name in names}
        if source is not None:
            seen = np.zeros(self._n.size, np.int64)
            for rows in row_batches(source, ("layer", "expert", *names)):
                key, known = self._key(rows)
                seen += np.bincount(key, minlength=len(seen))
                for name in names:
                    values[name][key] = rows[name][known]
            if not (seen == 1).all():
                raise ValueError(
                    f"expert_weights.parquet must have each of the {self.n_experts} experts of layers {list(self.layers)} once; "
                    f"{np.count_nonzero(seen != 1)} are missing or repeated"
                )
        row_norm, weight_norm, mean_abs, rms = (array.reshape(self._n.shape) for array in values.values())
        return row_norm, weight_norm, mean_abs, rms

    def _key(self, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Which (layer, expert) each row of these layers is of, and which rows these are."""
        layer, expert = (rows[name].astype(np.int64) for name in ("layer", "expert"))
        axis = np.searchsorted(self.layers, layer).clip(max=len(self.layers) - 1)
        known = np.asarray(self.layers)[axis] == layer
        if known.any() and (expert[known].min() < 0 or expert[known].max() >= self.n_experts):
            raise ValueError(f"a table of the run has expert {expert[known].max()}, but the model has {self.n_experts} experts")
        return axis[known] * self.n_experts + expert[known], known
