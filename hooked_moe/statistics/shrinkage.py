"""Means of groups that are unequally well known, each drawn towards the mean of all by as much as it is uncertain."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from hooked_moe.statistics.samples import MINIMUM_PAIRS, DegenerateSample, require_finite

PRIOR_DOCUMENTS = 10


@dataclass(frozen=True)
class ShrunkMeans:
    mean: Float[np.ndarray, " group"]  # shrunk; the mean of all where a group has no observation
    raw: Float[np.ndarray, " group"]  # NaN where a group has no observation
    between: float  # variance of the groups' true means; 0 where their differences are no larger than noise


def shrunk_means(total: Num[np.ndarray, "document group"], count: Num[np.ndarray, "document group"]) -> ShrunkMeans:
    """Empirical-Bayes means of groups (experts) from each document's sums and counts of observations.

    A mean of n observations has variance v / n, v being what an observation adds to it when the observations of a document are as
    alike as they are (clustered). Each group's v is its own, moderated by that of all groups as if this came from
    `PRIOR_DOCUMENTS` documents more: experts that cost much vary much. The variance between groups is by moments (DerSimonian
    and Laird, 1986). The cheapest of many raw means is cheap in part by luck, and the more so the fewer its observations:
    chosen by these, it is not.

    Where the groups' differences are no larger than noise, all but nothing of them is left, in the order of their evidence.

    Raises DegenerateSample for fewer than three documents.
    """
    require_finite("total", total)
    require_finite("count", count)
    documents = len(total)
    if documents < MINIMUM_PAIRS:
        raise DegenerateSample(f"{documents} documents; means of experts need at least {MINIMUM_PAIRS}")
    n = count.sum(axis=0, dtype=np.float64)
    seen = n > 0
    if not seen.any():
        raise DegenerateSample("no expert has an observation")
    raw = np.divide(total.sum(axis=0), n, out=np.full(len(n), np.nan), where=seen)
    residual = total - np.where(seen, raw, 0.0) * count
    square = (residual**2).sum(axis=0)
    pooled = float(square.sum() / n.sum() * documents / (documents - 1))
    own = np.divide(square, n, out=np.zeros(len(n)), where=seen)
    within = ((count > 0).sum(axis=0) * own + PRIOR_DOCUMENTS * pooled) / ((count > 0).sum(axis=0) + PRIOR_DOCUMENTS)
    grand = float(np.average(raw[seen], weights=n[seen]))
    spread = float((n[seen] * (raw[seen] - grand) ** 2).sum())
    between = max(0.0, (spread - pooled * (seen.sum() - 1)) / max(n.sum() - (n**2).sum() / n.sum(), 1e-300))
    prior = max(between, 1e-6 * pooled / n.sum())  # groups that may all be alike still have an order, by their evidence
    trust = np.divide(prior * n, prior * n + within, out=np.ones(len(n)), where=prior * n + within > 0)
    return ShrunkMeans(grand + trust * np.where(seen, raw - grand, 0.0), raw, between)
