"""The first pass over an effect table: what must be known before its positions can be sampled and its experts ranked."""

from collections.abc import Sequence

import numpy as np

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.statistics import StaticCeiling
from hooked_moe.tables.effect_grid import EffectGrid

SMALLEST_KL = 1e-6
"""nats; rounding in float32 is as large, so what is below is taken for this much."""


class Survey:
    """Documents, measured positions, each layer's between-expert share of the variance of the effects, and experts' sums."""

    def __init__(self, layers: Sequence[int], n_experts: int, measured_layers: Sequence[int]) -> None:
        """`layers` are those asked about; sums are taken of all that were measured."""
        self.layers = tuple(layers)
        self.sums = ExpertEffectSums(tuple(measured_layers), n_experts)
        self.n_measured = 0
        self.ceilings = [StaticCeiling(n_experts) for _ in self.layers]
        """Of delta_loss."""
        self.log_kl_ceilings = [StaticCeiling(n_experts) for _ in self.layers]
        """Of log KL: the expected effect, on the scale where its heavy tail does not hold all the variance."""
        self._documents: list[np.ndarray] = []

    def update(self, measured: EffectGrid) -> None:
        """Add a chunk's measured positions."""
        self.n_measured += len(measured.document)
        self._documents.append(np.unique(measured.document))
        self.sums.update(measured)
        if measured.n_slots < 2 or not len(measured.document):
            return
        for layer, ceiling, log_kl_ceiling in zip(self.layers, self.ceilings, self.log_kl_ceilings, strict=True):
            axis = measured.layer_axis(layer)
            expert = measured.expert[:, axis].astype(np.int64)
            ceiling.add(measured.document, expert, measured.delta_loss[:, axis])
            if measured.kl is not None:
                log_kl_ceiling.add(measured.document, expert, np.log(np.maximum(measured.kl[:, axis], SMALLEST_KL)))

    def documents(self) -> Documents:
        """Those with a measured position."""
        return Documents(np.unique(np.concatenate(self._documents)) if self._documents else np.zeros(0, np.int64))
