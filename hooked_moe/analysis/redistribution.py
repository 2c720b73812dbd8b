"""Does the rest of the block make up for an expert? redistribution.csv and redistribution_experts.csv.

arXiv 2606.10703 correlates, expert by expert, routing weight g with gap norm g ||E||, and gap norm with relative compensation
||r|| max(cos(r, c), 0) / ||c||, c the removed contribution and r the rest of the routed sum. The first is in part an identity:
the gap norm contains the routing weight. What is not one, g with ||E||, stands beside it. The second shares ||c|| between its
two sides, which alone makes for a negative correlation; how the rest is aligned, cos(r, c), does not contain it.
"""

import numpy as np
import pyarrow as pa
import scipy
from jaxtyping import Float, Int

from hooked_moe.tables.effect_grid import EffectGrid

TOKENS_PER_EXPERT = 4096
"""Correlated at most, of an expert in a layer: of more, every n-th is taken. The error of a correlation is then 0.016."""
MINIMUM_TOKENS = 10
CORRELATIONS = {
    "rho_weight_gap": ("weight", "gap"),
    "rho_weight_norm": ("weight", "norm"),
    "rho_gap_compensation": ("gap", "compensation"),
    "rho_gap_alignment": ("gap", "alignment"),
}
"""Name -> the two quantities of a Spearman correlation over the tokens that select the expert."""
_QUANTITIES = ("weight", "norm", "gap", "alignment", "compensation")


class RedistributionAccumulator:
    """Every n-th token of each expert in each layer; memory does not depend on how many tokens pass."""

    def __init__(self, layers: tuple[int, ...], n_tokens: Int[np.ndarray, "layer expert"]) -> None:
        """`n_tokens` counts the tokens that select each expert, over all chunks to come."""
        self.layers = layers
        self.n_tokens = n_tokens
        self._stride = np.maximum(1, -(-n_tokens // TOKENS_PER_EXPERT))
        self._seen = np.zeros_like(n_tokens)
        room = int(np.minimum(n_tokens, TOKENS_PER_EXPERT).max())
        self._values = np.full((len(_QUANTITIES), *n_tokens.shape, room), np.nan, np.float32)
        self.unmeasured = ""

    def update(self, chunk: EffectGrid) -> None:
        """Add a chunk of the effect table, its last tokens of documents included."""
        columns = (chunk.routing_weight, chunk.output_norm, chunk.gap_norm, chunk.rest_cosine, chunk.rest_norm)
        if any(column is None for column in columns):
            self.unmeasured = "not measured: the effect table lacks rest_norm or another of the columns that this takes"
            return
        for number, layer in enumerate(self.layers):
            axis = chunk.layer_axis(layer)
            expert = chunk.expert[:, axis].ravel().astype(np.int64)
            weight, norm, gap, cosine, rest = (column[:, axis].ravel() for column in columns if column is not None)
            ordinal = self._seen[number, expert] + _occurrence(expert)
            self._seen[number] += np.bincount(expert, minlength=self.n_tokens.shape[1])
            stride = self._stride[number, expert]
            kept = ordinal % stride == 0
            cells = (number, expert[kept], ordinal[kept] // stride[kept])
            aligned = rest * np.maximum(cosine, 0)
            compensation = np.divide(aligned, gap, out=np.full(len(gap), np.nan, np.float32), where=gap > 0)
            for quantity, values in enumerate((weight, norm, gap, cosine, compensation)):
                self._values[(quantity, *cells)] = values[kept]

    def experts(self) -> pa.Table:
        """One row per layer and expert: tokens, tokens used, mean gap norm, median compensation, and CORRELATIONS.

        Correlations over fewer than ten tokens are NaN. Empty where `unmeasured` says why.
        """
        rows = []
        for number, layer in enumerate(self.layers if not self.unmeasured else ()):
            for expert in range(self.n_tokens.shape[1]):
                every = dict(zip(_QUANTITIES, self._values[:, number, expert], strict=True))
                used = ~np.isnan(every["weight"])
                values = {name: column[used].astype(np.float64) for name, column in every.items()}
                row = {
                    "layer": layer,
                    "expert": expert,
                    "n_tokens": int(self.n_tokens[number, expert]),
                    "n_used": int(used.sum()),
                    "mean_gap_norm": float(values["gap"].mean()) if used.any() else np.nan,
                    "median_compensation": _median(values["compensation"]),
                }
                rows.append({**row, **_correlations(values)})
        return pa.Table.from_pylist(rows)


def layer_redistribution(experts: pa.Table) -> pa.Table:
    """Per layer: means over experts, each expert one unit, with 95% t intervals of the mean correlations.

    `n_experts` have a correlation; the rest were selected too rarely.
    """
    rows = []
    layers = experts.column("layer").to_numpy()
    for layer in np.unique(layers):
        here = {name: experts.column(name).to_numpy()[layers == layer] for name in experts.column_names}
        known = ~np.isnan(here["rho_weight_gap"])
        row: dict[str, object] = {
            "layer": int(layer),
            "n_experts": int(known.sum()),
            "n_removals": int(here["n_tokens"].sum()),
            "n_used": int(here["n_used"].sum()),
            "mean_gap_norm": _mean(here["mean_gap_norm"]),
            "mean_compensation": _mean(here["median_compensation"]),
        }
        for name in CORRELATIONS:
            mean, low, high = _interval(here[name][~np.isnan(here[name])])
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _occurrence(expert: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """How often each row's expert came before it."""
    order = np.argsort(expert, kind="stable")
    ordered = expert[order]
    result = np.empty(len(expert), np.int64)
    result[order] = np.arange(len(expert)) - np.searchsorted(ordered, ordered)
    return result


def _correlations(values: dict[str, Float[np.ndarray, " token"]]) -> dict[str, float]:
    """`CORRELATIONS` of an expert. Each quantity is ranked once, but where some tokens lack one of a pair."""
    whole = {name for name, column in values.items() if np.isfinite(column).all()}
    ranks = {name: scipy.stats.rankdata(values[name]) for name in whole}
    return {
        name: _pearson(ranks[one], ranks[two]) if {one, two} <= whole else _spearman(values[one], values[two])
        for name, (one, two) in CORRELATIONS.items()
    }


def _spearman(one: Float[np.ndarray, " token"], two: Float[np.ndarray, " token"]) -> float:
    both = np.isfinite(one) & np.isfinite(two)
    return _pearson(*(scipy.stats.rankdata(values[both]) for values in (one, two)))


def _pearson(one: Float[np.ndarray, " token"], two: Float[np.ndarray, " token"]) -> float:
    """NaN of fewer than ten tokens, and where one side is the same throughout."""
    if len(one) < MINIMUM_TOKENS or not np.ptp(one) or not np.ptp(two):
        return float("nan")
    return float(np.corrcoef(one, two)[0, 1])


def _median(values: Float[np.ndarray, " token"]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _mean(values: Float[np.ndarray, " expert"]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _interval(values: Float[np.ndarray, " expert"]) -> tuple[float, float, float]:
    if len(values) < 3:
        return _mean(values), float("nan"), float("nan")
    mean = float(values.mean())
    reach = float(values.std(ddof=1) / np.sqrt(len(values)) * scipy.stats.t.ppf(0.975, len(values) - 1))
    return mean, mean - reach, mean + reach
