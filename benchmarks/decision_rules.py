"""Every decision rule of the statistics, applied to a planted table: what it says of each layer and ranking."""

from __future__ import annotations

import numpy as np
import scipy.stats

from benchmarks.planted_effects import PlantedTable
from hooked_moe import statistics as stat

ALPHA = 0.05
SAMPLE = 200
"""Positions, as in the paper."""
EVIDENCE = 3.0
"""A Bayes factor above it is counted as a finding."""
BOUND = 0.1
"""Of equivalence, in d over positions."""

Decisions = dict[str, np.ndarray]
"""Rule -> [layer, ranking]: 1 where it speaks, 0 where not, NaN where it was not asked. "design effect" is no rule."""


def decisions(table: PlantedTable, seed: int) -> Decisions:
    """Of all rules on all cells. A rule over a family takes all cells of the table for its family."""
    shape = table.effect.shape
    chosen = np.random.default_rng(seed).permutation(len(table.document))[:SAMPLE]
    documents = int(table.document.max()) + 1
    by_document, spearman = np.empty((documents, *shape)), np.empty((documents, *shape))
    p: dict[str, np.ndarray] = {}
    said: Decisions = {}
    for layer, ranking in np.ndindex(shape):
        cell = layer, ranking
        score, delta = table.scores(*cell), table.delta[layer]
        ranks, ranks_of_delta = stat.within_position_ranks(score), stat.within_position_ranks(delta)
        difference = _picked(score, delta)
        by_document[(slice(None), *cell)] = _document_means(table, difference)
        spearman[(slice(None), *cell)] = _document_means(table, stat.spearman_of_ranks(ranks, ranks_of_delta))
        effect, truth = stat.clustered_dz(difference, table.document), table.effect[cell]
        of_sample = _tested("sample", difference[chosen], effect, table.effect.size)
        of_documents = _tested("documents", by_document[(slice(None), *cell)], effect, table.effect.size)
        exact = stat.cohens_dz(difference[chosen], np.zeros(SAMPLE))
        inflation = by_document[(slice(None), *cell)].var(ddof=1) / difference.var() * len(difference) / documents
        alike = stat.paired_t(difference, np.zeros_like(difference)).p
        _note(p, shape, cell, of_sample[0] | of_documents[0] | {"all positions as if independent: t": alike})
        _note(said, shape, cell, of_sample[1] | of_documents[1] | (_bayes(table, layer, ranks) if ranking == 0 else {}))
        _note(said, shape, cell, {"d: interval misses": not effect.low <= truth <= effect.high, "design effect": inflation})
        _note(said, shape, cell, {"sample: d interval misses": not exact.low <= truth <= exact.high})

    interval = stat.cluster_bootstrap(spearman.reshape(documents, -1), n_resamples=1000, seed=seed)
    said["Spearman: interval excludes 0"] = ((interval.low > 0) | (interval.high < 0)).reshape(shape)
    flips = stat.sign_flip_max_t(by_document.reshape(documents, -1), n_patterns=2000, seed=seed)
    p["documents: sign flip"], p["documents: max-T"] = flips.p.reshape(shape), flips.p_max.reshape(shape)
    for unit in ("sample", "documents"):
        for name, adjust in (("Bonferroni", stat.bonferroni), ("Holm", stat.holm), ("BH", stat.benjamini_hochberg)):
            p[f"{unit}: {name}"] = adjust(p[f"{unit}: t"].ravel()).reshape(shape)
    return said | {rule: values <= ALPHA for rule, values in p.items()}


def _tested(
    unit: str, difference: np.ndarray, effect: stat.ClusteredEffect, family: int
) -> tuple[dict[str, float], dict[str, float]]:
    """p of the tests of one cell, and what the rules say that need no other cell."""
    nothing = np.zeros_like(difference)
    t, ranks = stat.paired_t(difference, nothing), stat.wilcoxon_signed_rank(difference, nothing)
    outcome = stat.agreement(t, ranks, family, ALPHA)
    same = stat.equivalence(effect, BOUND) if unit == "documents" else stat.equivalence_dz(t.t, t.n, BOUND)
    verdict = stat.verdict(outcome)
    said = {"agreement": outcome in ("positive", "negative"), "equivalent": same.equivalent}
    said |= {f"verdict {name}": verdict == name for name in ("valid", "undecided", "reversed")}
    return {f"{unit}: t": t.p, f"{unit}: Wilcoxon": ranks.p}, {f"{unit}: {rule}": value for rule, value in said.items()}


def _note(store: dict[str, np.ndarray], shape: tuple[int, ...], cell: tuple[int, ...], values: dict[str, float]) -> None:
    for rule, value in values.items():
        store.setdefault(rule, np.full(shape, np.nan))[cell] = value


def _bayes(table: PlantedTable, layer: int, ranks: np.ndarray) -> dict[str, float]:
    """The Bayes factors, over t of each document's slope of the loss change on the ranks, and Plackett-Luce."""
    products, squares = (ranks * table.delta[layer]).sum(axis=1), (ranks**2).sum(axis=1)
    slopes = np.bincount(table.document, products) / np.bincount(table.document, squares)
    t = stat.paired_t(slopes, np.zeros_like(slopes))
    fit = stat.plackett_luce(stat.standardised(ranks), table.delta[layer], table.document)
    critical = scipy.stats.t.ppf(1 - ALPHA / 2, fit.n_documents - 1)
    return {
        "JZS": stat.jzs_bf10(t.t, t.n) > EVIDENCE,
        "directional JZS": stat.jzs_directional(t.t, t.n) > EVIDENCE,
        "Plackett-Luce, Savage-Dickey": fit.log_bf10 > np.log(EVIDENCE),
        "Plackett-Luce, beta": abs(fit.beta) > critical * fit.sd,
    }


def _picked(score: np.ndarray, delta: np.ndarray) -> np.ndarray:
    rows = np.arange(len(score))
    return delta[rows, score.argmax(axis=1)] - delta[rows, score.argmin(axis=1)]


def _document_means(table: PlantedTable, values: np.ndarray) -> np.ndarray:
    return np.bincount(table.document, values) / np.bincount(table.document)
