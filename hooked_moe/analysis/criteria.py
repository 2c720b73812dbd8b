"""Observational criteria: what is said about an expert without removing it.

Each criterion is one number per routed expert, taken over the real tokens of a corpus (padding never enters) or from the
weights: a function of `ExpertStatistics` under `@criterion`, which enters it into `CRITERIA`. A criterion of your own needs no
change here: decorate a function before the run is analysed, and it is ranked, tested and reported like the others.

Notation: `S_e` the tokens that select expert e, `T` all tokens, `g_e(t)` the routing weight as applied, `E_e(x_t)` the
expert's output before weighting, `p_e(t)` the router's softmax probability of e. The four criteria of arXiv 2606.10703 follow
that paper's text (section 3); the others, which it does not test, are those that expert pruning has been done by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.accumulators.expert_statistics import ExpertStatistics

PerExpert = Float[np.ndarray, "layer expert"]
Formula = Callable[[ExpertStatistics], PerExpert]
Family = Literal["paper", "extended"]
Direction = Literal["prune lowest", "prune highest", "none published"]

EFFECTS_FILE, ROUTING_FILE, WEIGHTS_FILE = "effects.parquet", "routing.parquet", "expert_weights.parquet"


@dataclass(frozen=True)
class Criterion:
    name: str
    label: str
    formula: str
    unit: str
    source: str
    direction: Direction
    """Which end its source prunes first. Where none is published, the lowest is taken to go first, and either end may help."""
    family: Family
    """Which criteria are tested, and corrected for, together."""
    measured_in: str
    """The file without which it is not measured."""
    compute: Formula


CRITERIA: dict[str, Criterion] = {}
"""Name -> criterion, in the order of the columns of experts.parquet."""


def criterion(
    *,
    label: str,
    formula: str,
    unit: str,
    source: str,
    direction: Direction = "prune lowest",
    family: Family = "extended",
    measured_in: str = EFFECTS_FILE,
) -> Callable[[Formula], Formula]:
    """Enter the decorated function into CRITERIA under its own name. Raises ValueError for a name that is taken."""

    def register(compute: Formula) -> Formula:
        name = compute.__name__
        if name in CRITERIA:
            raise ValueError(f"there is a criterion {name!r} already ({CRITERIA[name].source}); choose another name")
        CRITERIA[name] = Criterion(name, label, formula, unit, source, direction, family, measured_in, compute)
        return compute

    return register


def _mean(total: PerExpert, count: np.ndarray) -> PerExpert:
    """total / count; NaN over nothing."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


_PAPER = "arXiv 2606.10703, section 3"
_REAP = "arXiv 2510.13999 (REAP)"
_NORM = "residual stream"


# --- the paper's four ------------------------------------------------------------------------------------------------


@criterion(label="utilization rate", formula="|S_e| / T", unit="1", source=_PAPER, family="paper")
def utilization_rate(statistics: ExpertStatistics) -> PerExpert:
    """|S_e| / T: the fraction of tokens that select the expert. Sums to k over a layer's experts. arXiv 2606.10703."""
    return statistics.n_tokens / statistics.corpus_tokens[:, None]


@criterion(label="activation norm", formula="mean over S_e of ||E_e(x_t)||", unit=_NORM, source=_PAPER, family="paper")
def activation_norm(statistics: ExpertStatistics) -> PerExpert:
    """Mean of ||E_e(x_t)|| over S_e; NaN for an expert never selected. arXiv 2606.10703; mean EAN of arXiv 2504.05586."""
    return statistics.mean_norm


@criterion(label="mean routing weight when active", formula="mean over S_e of g_e(t)", unit="1", source=_PAPER, family="paper")
def mean_routing_weight_when_active(statistics: ExpertStatistics) -> PerExpert:
    """Mean of g_e(t) over S_e; NaN for an expert never selected. arXiv 2606.10703."""
    return statistics.mean_weight


@criterion(label="activation std", formula="std (ddof=1) over S_e of ||E_e(x_t)||", unit=_NORM, source=_PAPER, family="paper")
def activation_std(statistics: ExpertStatistics) -> PerExpert:
    """Standard deviation (ddof=1) of ||E_e(x_t)|| over S_e; NaN for fewer than two selections. arXiv 2606.10703."""
    n = statistics.n_tokens
    return np.sqrt(np.divide(statistics.m2_norm, n - 1, out=np.full(n.shape, np.nan), where=n > 1))


# --- more of routing and outputs -------------------------------------------------------------------------------------


@criterion(
    label="mean router probability",
    formula="mean over T of p_e(t)",
    unit="1",
    source="arXiv 2404.05089 (SEER-MoE)",
    measured_in=ROUTING_FILE,
)
def mean_router_probability(statistics: ExpertStatistics) -> PerExpert:
    """Mean of p_e(t) over all T, whether selected or not: the soft count of SEER-MoE, arXiv 2404.05089."""
    return statistics.mean_probability


@criterion(label="weighted frequency", formula="sum over S_e of g_e(t) / T", unit="1", source=_REAP)
def weighted_frequency(statistics: ExpertStatistics) -> PerExpert:
    """Sum of g_e(t) over S_e, / T: frequency weighted by the routing weight, a baseline of arXiv 2510.13999."""
    return (
        np.where(statistics.n_tokens > 0, statistics.mean_weight * statistics.n_tokens, 0.0) / statistics.corpus_tokens[:, None]
    )


@criterion(label="EAN sum", formula="sum over S_e of ||E_e(x_t)||", unit=_NORM, source="arXiv 2504.05586 (EAN)")
def ean_sum(statistics: ExpertStatistics) -> PerExpert:
    """Sum of ||E_e(x_t)|| over S_e, 0 for an expert never selected: expert activation norm (EAN), arXiv 2504.05586."""
    return np.where(statistics.n_tokens > 0, statistics.mean_norm * statistics.n_tokens, 0.0)


@criterion(
    label="mean squared norm",
    formula="mean over S_e of ||E_e(x_t)||^2",
    unit="residual stream^2",
    source="after arXiv 2504.05586 (EAN)",
)
def mean_squared_norm(statistics: ExpertStatistics) -> PerExpert:
    """Mean of ||E_e(x_t)||^2 over S_e, the output's energy; NaN for an expert never selected. After EAN, arXiv 2504.05586."""
    return statistics.mean_norm**2 + _mean(statistics.m2_norm, statistics.n_tokens)


@criterion(label="weighted EAN", formula="sum over S_e of g_e(t) ||E_e(x_t)||", unit=_NORM, source=_REAP)
def weighted_ean(statistics: ExpertStatistics) -> PerExpert:
    """Sum of g_e(t) ||E_e(x_t)|| over S_e, 0 for an expert never selected. A baseline of arXiv 2510.13999."""
    return np.where(statistics.n_tokens > 0, statistics.mean_gap * statistics.n_tokens, 0.0)


@criterion(label="REAP", formula="mean over S_e of g_e(t) ||E_e(x_t)||", unit=_NORM, source=_REAP)
def reap(statistics: ExpertStatistics) -> PerExpert:
    """Mean of g_e(t) ||E_e(x_t)|| over S_e; NaN for an expert never selected. REAP, arXiv 2510.13999, equation 9."""
    return statistics.mean_gap


@criterion(
    label="max activation",
    formula="max over S_e of the largest |coordinate| of E_e(x_t)",
    unit=_NORM,
    source="arXiv 2507.23279 (super experts, those that must not be pruned)",
    measured_in=ROUTING_FILE,
)
def max_activation(statistics: ExpertStatistics) -> PerExpert:
    """Largest |coordinate| of E_e(x_t) over S_e; NaN for an expert never selected. After arXiv 2507.23279.

    Its super experts are those whose value exceeds the 99.5th percentile of all layers and a tenth of the largest, in the layers
    that make massive activations: a set of a few experts rather than a ranking, so what it is defined by stands for it here.
    """
    return statistics.max_activation


@criterion(
    label="routing entropy",
    formula="mean over S_e of -sum_j p_j(t) ln p_j(t)",
    unit="nats",
    source="Shannon (1948)",
    direction="none published",
    measured_in=ROUTING_FILE,
)
def routing_entropy(statistics: ExpertStatistics) -> PerExpert:
    """Mean over S_e of the router's entropy -sum_j p_j(t) ln p_j(t): how undecided it is where it selects e. Shannon (1948)."""
    return statistics.mean_entropy


# --- weights alone ---------------------------------------------------------------------------------------------------


@criterion(label="router-row norm", formula="||w_e||", unit="weights", source="after arXiv 2405.16646", measured_in=WEIGHTS_FILE)
def router_row_norm(statistics: ExpertStatistics) -> PerExpert:
    """||w_e||, w_e the expert's row of the router. Change of router norm, arXiv 2405.16646, without the fine-tuning."""
    return statistics.router_row_norm


@criterion(
    label="expert-weight norm",
    formula="Frobenius norm of the expert's matrices",
    unit="weights",
    source="arXiv 1506.02626",
    measured_in=WEIGHTS_FILE,
)
def expert_weight_norm(statistics: ExpertStatistics) -> PerExpert:
    """Frobenius norm over the expert's three matrices together. Magnitude pruning, Han et al., arXiv 1506.02626."""
    return statistics.weight_norm


@criterion(
    label="AIMER",
    formula="mean |w| / rms w over the expert's matrices",
    unit="1",
    source="arXiv 2603.18492 (AIMER), whose released code prunes the highest first",
    direction="prune highest",
    measured_in=WEIGHTS_FILE,
)
def aimer(statistics: ExpertStatistics) -> PerExpert:
    """mean |w| / rms w over the expert's three matrices together: AIMER, arXiv 2603.18492.

    High where the weights are alike in size. Its authors remove the experts with the highest score.
    """
    return statistics.mean_abs_weight / statistics.rms_weight


# --- the company that experts keep -----------------------------------------------------------------------------------


@criterion(
    label="co-activation",
    formula="max over e' != e of |S_e and S_e'| / |S_e|",
    unit="1",
    source="arXiv 2409.02060 (OLMoE), section 5.2",
    direction="none published",
)
def coactivation(statistics: ExpertStatistics) -> PerExpert:
    """Largest over e' != e of |S_e and S_e'| / |S_e|: how much of e's work one other expert shares. OLMoE, arXiv 2409.02060,
    section 5.2. NaN for an expert never selected, and where one expert is active at a time."""
    together = statistics.coactivations
    return _mean(together.max(axis=2).astype(np.float64), np.where(together.any(axis=2), statistics.n_tokens, 0))


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
