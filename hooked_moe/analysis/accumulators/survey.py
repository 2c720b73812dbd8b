"""The first pass over an effect table: what must be known before its positions can be sampled and its experts ranked."""

from collections.abc import Sequence

import numpy as np

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.statistics import StaticCeiling
from hooked_moe.tables.effect_grid import EffectGrid


class Survey:
    """Documents, measured positions, and each layer's between-expert share of the variance of the loss change."""

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        self.layers = tuple(layers)
        self.n_measured = 0
        self.ceilings = [StaticCeiling(n_experts) for _ in self.layers]
        self._documents: list[np.ndarray] = []

    def update(self, measured: EffectGrid) -> None:
        """Add a chunk's measured positions."""
        self.n_measured += len(measured.document)
        self._documents.append(np.unique(measured.document))
        if measured.n_slots < 2 or not len(measured.document):
            return
        for layer, ceiling in zip(self.layers, self.ceilings, strict=True):
            axis = measured.layer_axis(layer)
            ceiling.add(measured.document, measured.expert[:, axis].astype(np.int64), measured.delta_loss[:, axis])

    def documents(self) -> Documents:
        """Those with a measured position."""
        return Documents(np.unique(np.concatenate(self._documents)) if self._documents else np.zeros(0, np.int64))
