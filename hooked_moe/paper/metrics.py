"""The paper's four metrics, and its redistribution, as the released code computes them from rows of padded batches.

Which form a family's code takes is tabulated in `protocols`; the forms differ enough to rank experts differently.
`hooked_moe.analysis.criteria` has the metrics as the paper defines them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from hooked_moe.paper.padded_rows import COORDINATES, LayerRows
from hooked_moe.paper.protocols import Released

ExpertValues = Float[np.ndarray, " expert"]
"""A number for each expert of one layer."""


def released_criteria(rows: LayerRows, released: Released) -> dict[str, ExpertValues]:
    """Each metric's value of every expert. An expert that no row selects has 0, as released, except for mean logits."""
    counted = np.ones_like(rows.real) if released.padding else rows.real
    of_first_texts = (np.arange(len(counted)) < (released.texts_for_norms or len(counted)))[:, None]
    every, first = _Counted.of(rows, counted), _Counted.of(rows, counted & of_first_texts)
    return {
        "utilization_rate": _UTILIZATION[released.utilization_rate](every),
        "activation_norm": _mean_by_expert(first.expert, first.norm, first.n_experts),
        "mean_routing_weight_when_active": _MEAN_WEIGHT[released.mean_routing_weight_when_active](every),
        "activation_std": _SPREAD[released.activation_std](first),
    }


@dataclass(frozen=True)
class _Counted:
    """The rows that a metric reads."""

    logits: Float[np.ndarray, "row expert"]
    expert: Int[np.ndarray, "row slot"]
    weight: Float[np.ndarray, "row slot"]
    norm: Float[np.ndarray, "row slot"]
    coordinate_sum: Float[np.ndarray, "row slot"]
    coordinate_square: Float[np.ndarray, "row slot"]

    @classmethod
    def of(cls, rows: LayerRows, counted: Bool[np.ndarray, "text pos"]) -> _Counted:
        values = (rows.routing_weight, rows.output_norm, rows.coordinate_sum, rows.coordinate_square)
        wide = (column[counted].astype(np.float64) for column in (rows.router_logits, *values))
        logits, weight, norm, coordinate_sum, coordinate_square = wide
        return cls(logits, rows.expert[counted], weight, norm, coordinate_sum, coordinate_square)

    @property
    def n_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def selections(self) -> Int[np.ndarray, " expert"]:
        return np.bincount(self.expert.ravel(), minlength=self.n_experts)


def _mean_logit_above_threshold(rows: _Counted) -> ExpertValues:
    """Mean of an expert's logits that reach the lowest k-th logit of any row: nearly all of its rows."""
    k = rows.expert.shape[1]
    above = rows.logits >= np.partition(rows.logits, -k, axis=1)[:, -k].min()
    count = above.sum(axis=0)
    return np.where(count > 0, (rows.logits * above).sum(axis=0) / np.maximum(count, 1), 0.0)


def _mean_probability(rows: _Counted) -> ExpertValues:
    """The mean of the softmax over all experts, not renormalised over the selected ones."""
    selected = np.take_along_axis(scipy.special.softmax(rows.logits, axis=1), rows.expert, axis=1)
    return _mean_by_expert(rows.expert, selected, rows.n_experts)


def _std_of_norms(rows: _Counted) -> ExpertValues:
    """The std with ddof=1; NaN for an expert selected once, 0 for one never selected."""
    count = rows.selections
    centred = rows.norm - _mean_by_expert(rows.expert, rows.norm, rows.n_experts)[rows.expert]
    squares = np.bincount(rows.expert.ravel(), centred.ravel() ** 2, rows.n_experts)
    return np.where(count == 1, np.nan, np.sqrt(squares / np.maximum(count - 1, 1)))


def _std_of_coordinates(rows: _Counted) -> ExpertValues:
    """The std with ddof=0, over the first coordinates of all outputs of an expert together."""
    mean, square = (
        _mean_by_expert(rows.expert, values, rows.n_experts) / COORDINATES
        for values in (rows.coordinate_sum, rows.coordinate_square)
    )
    return np.sqrt(np.maximum(square - mean**2, 0.0))


_Metric = dict[str, Callable[[_Counted], ExpertValues]]
_UTILIZATION: _Metric = {
    "mean_logit": lambda rows: rows.logits.mean(axis=0),
    "share_of_rows": lambda rows: rows.selections / len(rows.logits),
    "share_of_selections": lambda rows: rows.selections / rows.selections.sum(),
}
_MEAN_WEIGHT: _Metric = {
    "mean_logit_above_threshold": _mean_logit_above_threshold,
    "mean_weight": lambda rows: _mean_by_expert(rows.expert, rows.weight, rows.n_experts),
    "mean_probability": _mean_probability,
}
_SPREAD: _Metric = {"of_norms": _std_of_norms, "of_coordinates": _std_of_coordinates}


def _mean_by_expert(expert: Int[np.ndarray, "row slot"], values: Float[np.ndarray, "row slot"], n_experts: int) -> ExpertValues:
    count = np.bincount(expert.ravel(), minlength=n_experts)
    return np.bincount(expert.ravel(), values.ravel(), n_experts) / np.maximum(count, 1)


class RedistributionByExpert(NamedTuple):
    """Means over the rows that select an expert; 0 for one that no row selects."""

    n_rows: Int[np.ndarray, " expert"]
    routing_weight: ExpertValues
    gap_norm: ExpertValues
    relative_compensation: ExpertValues

    def correlations(self) -> tuple[float, float]:
        """Spearman of (routing weight, gap norm) and of (gap norm, relative compensation) over experts."""
        pairs = ((self.routing_weight, self.gap_norm), (self.gap_norm, self.relative_compensation))
        first, second = (float(scipy.stats.spearmanr(a, b).statistic) for a, b in pairs)
        return first, second


def released_redistribution(rows: LayerRows, aligned: bool = False) -> RedistributionByExpert:
    """Each expert's gap norm and relative compensation, over the rows whose router selects it.

    As released, row i of the router is paired with the i-th real token's output: the router's rows count padding, the outputs
    do not. So most "gaps" are of tokens that the expert does not serve, and are 0. `aligned=True` pairs each token with itself;
    then the gap norm is g ||E||, an identity.
    """
    real = rows.real.ravel()
    logits = rows.router_logits.reshape(len(real), -1)
    logits = (logits[real] if aligned else logits[: real.sum()]).astype(np.float64)
    n_experts, k = logits.shape[1], rows.expert.shape[-1]
    probability = scipy.special.softmax(logits, axis=1)
    selected = np.argpartition(logits, -k, axis=1)[:, -k:]

    serving = rows.expert.reshape(-1, k)[real]
    same = selected[:, :, None] == serving[:, None, :]  # [row, selected, slot]
    gap_norm, rest_norm, cosine = (
        (same * values.reshape(-1, 1, k)[real]).sum(axis=2) for values in (rows.gap_norm, rows.rest_norm, rows.rest_cosine)
    )
    tiny = gap_norm <= 1e-10
    compensation = np.where(tiny, 0.0, rest_norm * np.maximum(cosine, 0.0) / np.where(tiny, 1.0, gap_norm))
    weight = np.take_along_axis(probability, selected, axis=1)
    means = [_mean_by_expert(selected, values, n_experts) for values in (weight, gap_norm, compensation)]
    return RedistributionByExpert(np.bincount(selected.ravel(), minlength=n_experts), *means)
