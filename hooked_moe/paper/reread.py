"""The paper's released comparisons, pooled and read in nats: what its cell-by-cell tests do not ask.

The paper tests 20 cells of a model apart, each for a difference that is large against the scatter of single tokens. The same
comparisons also say what the expert that a statistic ranks highest costs on average, and what the one that it ranks lowest costs,
over five layers of one statistic, and over all four statistics.

    reread_table()      a row per model and statistic, and one ("all") with the four pooled; what reread.csv holds

The unit of evidence is the paragraph: the positions of one paragraph are alike, and every position serves in five layers. Pooling
was decided after the data had been seen. The effects are those of the released code: the expert is removed from the whole
sequence, its statistics count padding, and DeepSeek-V2-Lite ran in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from hooked_moe.paper.published import METRICS, released_comparisons
from hooked_moe.statistics import paired_t, sign_flip_max_t
from hooked_moe.statistics.samples import cluster_sums

MODELS = {"deepseek-v2-lite": "DeepSeek-V2-Lite", "olmoe": "OLMoE-1B-7B"}
"""The models whose comparisons were released pair by pair, with their full names."""
POOLED = "all"
"""Stands for the metric where all four are pooled."""
N_RESAMPLES = 20_000
N_PATTERNS = 100_000


def reread_table() -> pa.Table:
    """Mean cost of the highest- and of the lowest-ranked expert and their difference, in nats, for every model and metric."""
    rows = []
    for name, full_name in MODELS.items():
        comparisons = released_comparisons(name)
        for metric in (*METRICS, POOLED):
            chosen = comparisons if metric == POOLED else comparisons.filter(pc.equal(comparisons["metric"], metric))
            rows.append({"model": full_name, "metric": metric, **pooled(chosen)})
    return pa.Table.from_pylist(rows)


def pooled(comparisons: pa.Table) -> dict[str, int | float]:
    """One row of the table, from comparisons with columns metric, text (the paragraph), position, high_delta and low_delta.

    The interval is the percentile bootstrap over paragraphs, of the mean over comparisons; the sign flip turns the sums of whole
    paragraphs. `p_t` is Student's paired t over positions, each the mean of its layers: the reading that takes them for
    independent.
    """
    high, low = (comparisons[name].to_numpy() for name in ("high_delta", "low_delta"))
    count, total = cluster_sums(comparisons["text"].to_numpy(), high - low)
    ends = _percentile_interval(total, count)
    position = _numbered(comparisons, ("metric", "text", "position"))
    by_position = [np.divide(*reversed(cluster_sums(position, values))) for values in (high, low)]
    return {
        "n_paragraphs": len(total),
        "high": float(high.mean()),
        "low": float(low.mean()),
        "difference": float((high - low).mean()),
        "difference_low": ends[0],
        "difference_high": ends[1],
        "p_sign_flip": float(sign_flip_max_t(total[:, None], N_PATTERNS).p[0]),
        "p_t": paired_t(*by_position).p,
    }


def _numbered(table: pa.Table, keys: Sequence[str]) -> Int[np.ndarray, " row"]:
    """A number for each row; rows that agree in all keys share theirs."""
    columns = [np.unique(table[key].to_numpy().astype(str), return_inverse=True)[1] for key in keys]
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _percentile_interval(total: Float[np.ndarray, " paragraph"], count: Float[np.ndarray, " paragraph"]) -> tuple[float, float]:
    n = len(total)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    low, high = np.quantile(drawn @ total / (drawn @ count), [0.025, 0.975])
    return float(low), float(high)
