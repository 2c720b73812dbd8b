"""Observational criteria: what is said about an expert without removing it.

Each criterion is one number per routed expert, taken over the real tokens of a corpus (padding never enters) or from the
weights, and is a function of `ExpertStatistics`. `CRITERIA` is the table of them; add a row there to audit one more.

Notation: `S_e` the tokens that select expert e, `T` all tokens, `g_e(t)` the routing weight as applied, `E_e(x_t)` the
expert's output before weighting, `p_e(t)` the router's softmax probability of e. The four criteria of arXiv 2606.10703 follow
that paper's text (section 3); the others, which it does not test, are those that expert pruning has been done by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator, ExpertStatistics
from hooked_moe.tables.effect_grid import Source, effect_chunks

PerExpert = Float[np.ndarray, "layer expert"]
Family = Literal["paper", "extended"]


@dataclass(frozen=True)
class Criterion:
    name: str
    label: str
    formula: str
    unit: str
    source: str
    family: Family
    """Which criteria are tested, and corrected for, together."""
    measured_in: str
    """The file without which it is not measured."""
    compute: Callable[[ExpertStatistics], PerExpert]


def _over(total: PerExpert, count: np.ndarray) -> PerExpert:
    """A mean; NaN over nothing."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


# --- the paper's four ------------------------------------------------------------------------------------------------


def utilization_rate(statistics: ExpertStatistics) -> PerExpert:
    """|S_e| / T: the fraction of tokens that select the expert. Sums to k over a layer's experts. arXiv 2606.10703."""
    return statistics.n_tokens / statistics.corpus_tokens[:, None]


def activation_norm(statistics: ExpertStatistics) -> PerExpert:
    """Mean of ||E_e(x_t)|| over S_e; NaN for an expert never selected. arXiv 2606.10703; mean EAN of arXiv 2504.05586."""
    return statistics.mean_norm


def mean_routing_weight_when_active(statistics: ExpertStatistics) -> PerExpert:
    """Mean of g_e(t) over S_e; NaN for an expert never selected. arXiv 2606.10703."""
    return statistics.mean_weight


def activation_std(statistics: ExpertStatistics) -> PerExpert:
    """Standard deviation (ddof=1) of ||E_e(x_t)|| over S_e; NaN for fewer than two selections. arXiv 2606.10703."""
    n = statistics.n_tokens
    return np.sqrt(np.divide(statistics.m2_norm, n - 1, out=np.full(n.shape, np.nan), where=n > 1))


# --- more of routing and outputs -------------------------------------------------------------------------------------


def mean_router_probability(statistics: ExpertStatistics) -> PerExpert:
    """Mean of p_e(t) over all T, whether selected or not: the soft count of SEER-MoE, arXiv 2404.05089."""
    return statistics.mean_probability


def weighted_frequency(statistics: ExpertStatistics) -> PerExpert:
    """Sum of g_e(t) over S_e, / T: frequency weighted by the routing weight, a baseline of arXiv 2510.13999."""
    return (
        np.where(statistics.n_tokens > 0, statistics.mean_weight * statistics.n_tokens, 0.0) / statistics.corpus_tokens[:, None]
    )


def ean_sum(statistics: ExpertStatistics) -> PerExpert:
    """Sum of ||E_e(x_t)|| over S_e, 0 for an expert never selected: expert activation norm (EAN), arXiv 2504.05586."""
    return np.where(statistics.n_tokens > 0, statistics.mean_norm * statistics.n_tokens, 0.0)


def mean_squared_norm(statistics: ExpertStatistics) -> PerExpert:
    """Mean of ||E_e(x_t)||^2 over S_e, the output's energy; NaN for an expert never selected. After EAN, arXiv 2504.05586."""
    return statistics.mean_norm**2 + _over(statistics.m2_norm, statistics.n_tokens)


def weighted_ean(statistics: ExpertStatistics) -> PerExpert:
    """Sum of g_e(t) ||E_e(x_t)|| over S_e, 0 for an expert never selected. A baseline of arXiv 2510.13999."""
    return np.where(statistics.n_tokens > 0, statistics.mean_gap * statistics.n_tokens, 0.0)


def reap(statistics: ExpertStatistics) -> PerExpert:
    """Mean of g_e(t) ||E_e(x_t)|| over S_e; NaN for an expert never selected. REAP, arXiv 2510.13999, equation 9."""
    return statistics.mean_gap


def max_activation(statistics: ExpertStatistics) -> PerExpert:
    """Largest |coordinate| of E_e(x_t) over S_e; NaN for an expert never selected. Super experts, arXiv 2507.23279."""
    return statistics.max_activation


def routing_entropy(statistics: ExpertStatistics) -> PerExpert:
    """Mean over S_e of the router's entropy -sum_j p_j(t) ln p_j(t): how undecided it is where it selects e. Shannon (1948)."""
    return statistics.mean_entropy


def coactivation(statistics: ExpertStatistics) -> PerExpert:
    """Largest over e' != e of |S_e and S_e'| / |S_e|: how much of e's work one other expert shares. OLMoE, arXiv 2409.02060,
    section 5.2. NaN for an expert never selected, and where one expert is active at a time."""
    together = statistics.coactivations
    return _over(together.max(axis=2).astype(np.float64), np.where(together.any(axis=2), statistics.n_tokens, 0))


# --- weights alone ---------------------------------------------------------------------------------------------------


def router_row_norm(statistics: ExpertStatistics) -> PerExpert:
    """||w_e||, w_e the expert's row of the router. Change of router norm, arXiv 2405.16646, without the fine-tuning."""
    return statistics.router_row_norm


def expert_weight_norm(statistics: ExpertStatistics) -> PerExpert:
    """Frobenius norm over the expert's three matrices together. Magnitude pruning, Han et al., arXiv 1506.02626."""
    return statistics.weight_norm


def aimer(statistics: ExpertStatistics) -> PerExpert:
    """mean |w| / rms w over the expert's three matrices together: AIMER, arXiv 2603.18492."""
    return statistics.mean_abs_weight / statistics.rms_weight


_EFFECTS, _ROUTING, _WEIGHTS = "effects.parquet", "routing.parquet", "expert_weights.parquet"
_PAPER = "arXiv 2606.10703, section 3"
_REAP = "arXiv 2510.13999 (REAP)"
_NORM = "residual stream"
_ROWS: tuple[tuple[str, str, str, str, str, Family, str, Callable[[ExpertStatistics], PerExpert]], ...] = (
    ("utilization_rate", "utilization rate", "|S_e| / T", "1", _PAPER, "paper", _EFFECTS, utilization_rate),
    ("activation_norm", "activation norm", "mean over S_e of ||E_e(x_t)||", _NORM, _PAPER, "paper", _EFFECTS, activation_norm),
    (
        "mean_routing_weight_when_active",
        "mean routing weight when active",
        "mean over S_e of g_e(t)",
        "1",
        _PAPER,
        "paper",
        _EFFECTS,
        mean_routing_weight_when_active,
    ),
    (
        "activation_std",
        "activation std",
        "std (ddof=1) over S_e of ||E_e(x_t)||",
        _NORM,
        _PAPER,
        "paper",
        _EFFECTS,
        activation_std,
    ),
    (
        "mean_router_probability",
        "mean router probability",
        "mean over T of p_e(t)",
        "1",
        "arXiv 2404.05089 (SEER-MoE)",
        "extended",
        _ROUTING,
        mean_router_probability,
    ),
    (
        "weighted_frequency",
        "weighted frequency",
        "sum over S_e of g_e(t) / T",
        "1",
        _REAP,
        "extended",
        _EFFECTS,
        weighted_frequency,
    ),
    ("ean_sum", "EAN sum", "sum over S_e of ||E_e(x_t)||", _NORM, "arXiv 2504.05586 (EAN)", "extended", _EFFECTS, ean_sum),
    (
        "mean_squared_norm",
        "mean squared norm",
        "mean over S_e of ||E_e(x_t)||^2",
        "residual stream^2",
        "after arXiv 2504.05586 (EAN)",
        "extended",
        _EFFECTS,
        mean_squared_norm,
    ),
    ("weighted_ean", "weighted EAN", "sum over S_e of g_e(t) ||E_e(x_t)||", _NORM, _REAP, "extended", _EFFECTS, weighted_ean),
    ("reap", "REAP", "mean over S_e of g_e(t) ||E_e(x_t)||", _NORM, _REAP, "extended", _EFFECTS, reap),
    (
        "max_activation",
        "max activation",
        "max over S_e of the largest |coordinate| of E_e(x_t)",
        _NORM,
        "arXiv 2507.23279 (super experts)",
        "extended",
        _ROUTING,
        max_activation,
    ),
    (
        "routing_entropy",
        "routing entropy",
        "mean over S_e of -sum_j p_j(t) ln p_j(t)",
        "nats",
        "Shannon (1948)",
        "extended",
        _ROUTING,
        routing_entropy,
    ),
    ("router_row_norm", "router-row norm", "||w_e||", "weights", "after arXiv 2405.16646", "extended", _WEIGHTS, router_row_norm),
    (
        "expert_weight_norm",
        "expert-weight norm",
        "Frobenius norm of the expert's matrices",
        "weights",
        "arXiv 1506.02626",
        "extended",
        _WEIGHTS,
        expert_weight_norm,
    ),
    (
        "aimer",
        "AIMER",
        "mean |w| / rms w over the expert's matrices",
        "1",
        "arXiv 2603.18492 (AIMER)",
        "extended",
        _WEIGHTS,
        aimer,
    ),
    (
        "coactivation",
        "co-activation",
        "max over e' != e of |S_e and S_e'| / |S_e|",
        "1",
        "arXiv 2409.02060 (OLMoE), section 5.2",
        "extended",
        _EFFECTS,
        coactivation,
    ),
)
CRITERIA: dict[str, Criterion] = {row[0]: Criterion(*row) for row in _ROWS}
PAPER_CRITERIA = tuple(name for name, criterion in CRITERIA.items() if criterion.family == "paper")
EXTENDED_CRITERIA = tuple(name for name, criterion in CRITERIA.items() if criterion.family == "extended")


def criteria_table(statistics: ExpertStatistics) -> pa.Table:
    """One row per layer and expert: layer, expert, n_tokens (selections), then a column per criterion.

    A criterion whose file the run lacks is NaN throughout.
    """
    n_layers, n_experts = statistics.n_tokens.shape
    columns = {
        "layer": np.repeat(np.asarray(statistics.layers, np.int16), n_experts),
        "expert": np.tile(np.arange(n_experts, dtype=np.int16), n_layers),
        "n_tokens": statistics.n_tokens.ravel(),
        **{name: criterion.compute(statistics).ravel() for name, criterion in CRITERIA.items()},
    }
    meanings = {
        "layer": ("transformer block, counted from 0", "index"),
        "expert": ("routed expert, counted from 0", "index"),
        "n_tokens": ("real tokens that select the expert", "tokens"),
        **{name: (f"{criterion.formula}; {criterion.source}", criterion.unit) for name, criterion in CRITERIA.items()},
    }
    arrays = {name: pa.array(values) for name, values in columns.items()}
    fields = [
        pa.field(name, array.type, metadata=dict(zip(("meaning", "unit"), meanings[name], strict=True)))
        for name, array in arrays.items()
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def expert_criteria(
    effects: Source,
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    routing: Source | None = None,
    expert_weights: Source | None = None,
) -> pa.Table:
    """The criteria of every expert over all rows of an effect table, as `criteria_table`; the rows are streamed.

    `layers` keeps some of the table's layers. Rows without delta_loss (a document's last token) count: their token was routed
    like any other. Without `routing` or `expert_weights` the criteria that come from them are NaN.
    """
    accumulator = None
    for chunk in effect_chunks(effects, ("expert", "delta_loss", "routing_weight", "output_norm")):
        if accumulator is None:
            accumulator = ExpertAccumulator(chunk.layers if layers is None else layers, n_experts)
        accumulator.update(chunk)
    assert accumulator is not None  # effect_chunks refuses an empty table
    return criteria_table(accumulator.statistics(routing, expert_weights))
