"""Stacking (Yao, Vehtari, Simpson and Gelman, 2018): the mixture of models that predicts held-out units best."""

from dataclasses import dataclass

import numpy as np
import scipy.special
from jaxtyping import Float

from hooked_moe.statistics.samples import require_finite

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Stacking:
    weight: Float[np.ndarray, " model"]  # 0 or more, summing to 1
    log_score: float  # of the mixture, mean per unit
    gap: float  # the best mixture's mean log score exceeds this one's by no more


def stacking_weights(log_score: Float[np.ndarray, "unit model"], max_steps: int = 50_000) -> Stacking:
    """Weights that maximise the mean over units of log sum_m w_m exp(log_score[unit, m]), by EM from equal weights.

    The problem is concave and each step raises the score. It ends when the duality gap, log max_m mean_u p_um / p_u,
    is below 1e-6 nats per unit; the gap reached is returned. With a document's log score as the unit, a weight reads as
    the share of documents which that model predicts best; give chance a column, so that "none" can win.

    Raises ValueError for NaN and infinite scores.
    """
    require_finite("log_score", log_score)
    units, models = log_score.shape
    if units == 0 or models == 0:
        raise ValueError(f"stacking needs units and models, got a table of {units} x {models}")
    highest = log_score.max(axis=1, keepdims=True)
    density = np.exp(log_score - highest)  # relative to the unit's best model: no underflow where it matters
    weight = np.full(models, 1 / models)
    for _ in range(max_steps):
        gain = np.mean(density / (density @ weight)[:, None], axis=0)
        gap = float(np.log(gain.max()))
        if gap < _TOLERANCE:
            break
        weight = weight * gain
        weight /= weight.sum()
    mixture = scipy.special.logsumexp(log_score, axis=1, b=weight)
    return Stacking(weight, float(mixture.mean()), gap)
