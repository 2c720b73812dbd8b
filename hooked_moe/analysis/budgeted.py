"""What a budgeted run says: means of layers and experts, and savings, each with two intervals.

    estimates.parquet, sampled_effects.parquet, draw.parquet  -> budgeted.csv, savings.csv, experts.parquet,
                                                                 expert_effect_sums.parquet
    routing.parquet, expert_weights.parquet                   -> criteria, in experts.parquet

The *sampling interval* holds what an exhaustive audit of these very documents would find. The *interval* holds what other
documents of the kind would say, as in an exhaustive audit. Estimated effects, summed by document, differ by both, what the
documents are and what was drawn in each (independently), so that nothing is left out: of layers and savings it is the same
bootstrap over documents; of experts, for which a few removals decide, t times the standard error, with a moderated variance of
what was drawn.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.stats

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.accumulators.sampling import SamplingAccumulator
from hooked_moe.analysis.criteria import criteria_table
from hooked_moe.analysis.estimated_effects import DRAW, EFFECTS, ESTIMATES, SAMPLED, BudgetedTables
from hooked_moe.analysis.rankings import Scores
from hooked_moe.analysis.saving_table import ALL_LAYERS, SAVINGS, saving_table
from hooked_moe.analysis.savings import EXACT_KL, SavingAudit
from hooked_moe.statistics import MINIMUM_PAIRS, ratio_bootstrap
from hooked_moe.statistics.difference_estimates import SamplingVariance, Z
from hooked_moe.tables import Ledger, schema_of, write_csv_atomic, write_parquet_atomic

INPUTS = (DRAW, ESTIMATES, "expert_weights.parquet", "routing.parquet", SAMPLED)
NOT_ESTIMATED = "a sample of the removals cannot tell it: `hooked-moe audit` without --budget makes all of them"
_LEFT_OUT = (
    *("bayes.csv", "ceiling.csv", "ceiling_kl.csv", "cells.csv", "domains.csv", "layers.csv", "positions.csv", "progressive.csv"),
    *("redistribution.csv", "scopes.csv", "slot_distribution.csv", "slots.csv"),
)
_ORDER = ("spearman", "spearman_low", "spearman_high")
"""Columns of savings.csv that are orders within a position, which estimated effects do not have."""

BUDGETED = schema_of(
    ("effect", pa.string(), "text", "delta_loss (of the token that followed) or kl (expected over the model's own next token)"),
    ("kind", pa.string(), "name", "layer or expert: a mean effect; saving or saving_share: of a ranking"),
    ("layer", pa.string(), "text", "transformer block, counted from 0, or all"),
    ("name", pa.string(), "text", "the expert's number, or the ranking; empty for a layer"),
    (
        "estimate",
        pa.float64(),
        "nats or 1",
        "unbiased over which removals were drawn; a saving_share is a share of the random cost",
    ),
    (
        "sampling_low",
        pa.float64(),
        "nats or 1",
        "lower end of the 95% interval for what all removals in these documents would give",
    ),
    ("sampling_high", pa.float64(), "nats or 1", "upper end"),
    ("low", pa.float64(), "nats or 1", "lower end of the 95% interval for other documents: over documents and removals drawn"),
    ("high", pa.float64(), "nats or 1", "upper end; NaN where there are fewer than three documents"),
    ("n_drawn", pa.int64(), "removals", "removals drawn in the group: for a ranking, in its layers"),
)


def analyse_budgeted(run_dir: str | os.PathLike[str], *, n_experts: int, seed: int = 42) -> None:
    """Derive every table of a budgeted run from its measured ones.

    Raises FileNotFoundError where one of these is missing, ValueError where they are not of one measurement.
    """
    run = Path(run_dir)
    derived = _derive(run, n_experts, seed)
    for name, table in derived.items():
        (write_parquet_atomic if name.endswith(".parquet") else write_csv_atomic)(table, run / name)
    Ledger(run).record(
        _ANALYSIS,
        INPUTS,
        derived,
        settings={"n_experts": n_experts, "seed": seed},
        command="hooked-moe audit --budget",
        not_measured=dict.fromkeys(_LEFT_OUT, NOT_ESTIMATED),
    )


def budgeted_fault(run: Path, known: Any = None, *, n_experts: int, seed: int = 42) -> str | None:
    """Why the derived tables are not those that `analyse_budgeted` would write now; None where they are."""
    return Ledger(run, known).fault(_ANALYSIS, INPUTS, {"n_experts": n_experts, "seed": seed})


_ANALYSIS = "analysis"


def _derive(run: Path, n_experts: int, seed: int) -> dict[str, pa.Table]:
    tables = BudgetedTables(run)
    experts, sums = ExpertAccumulator(tables.layers, n_experts), ExpertEffectSums(tables.layers, n_experts)
    documents: list[np.ndarray] = []
    n_slots = 0
    for chunk in tables.chunks():
        experts.update(chunk.observed)
        sums.update(chunk.effects)
        documents.append(np.unique(chunk.effects.document))
        n_slots = chunk.effects.n_slots
    optional = [run / name if (run / name).is_file() else None for name in ("routing.parquet", "expert_weights.parquet")]
    criteria = criteria_table(experts.statistics(*optional))
    scores = Scores(criteria, sums, tables.layers)
    n_measured = int(sums.n_positions().sum())
    audit = SavingAudit(scores, sums, Documents(np.unique(np.concatenate(documents))), n_slots, n_measured, seed)
    sampling = SamplingAccumulator(tables.layers, n_experts, len(audit.rankings))
    for chunk in tables.chunks():
        audit.update(chunk.effects)
        sampling.update_experts(chunk)
        for axis, layer in enumerate(tables.layers):
            at = chunk.effects.layer_axis(layer)
            expert = np.ascontiguousarray(chunk.effects.expert[:, at].T)
            sampling.update_rankings(axis, chunk, audit.rankings_at(chunk.effects, axis, at, expert))
    savings = _without_orders(saving_table(audit))
    rows = [row for effect in EFFECTS for row in _rows(effect, sums, audit, sampling, tables, savings)]
    return {
        "budgeted.csv": pa.Table.from_pylist(rows, schema=BUDGETED),
        "savings.csv": savings,
        "experts.parquet": _experts(criteria, sums, sampling),
        "expert_effect_sums.parquet": sums.table(),
    }


def _without_orders(savings: pa.Table) -> pa.Table:
    """The savings without what cannot be told: rank correlations, and the exact expected effect as a ranking."""
    rows = [{**row, **dict.fromkeys(_ORDER, float("nan"))} for row in savings.to_pylist() if row["ranking"] != EXACT_KL]
    return pa.Table.from_pylist(rows, schema=SAVINGS)


def _experts(criteria: pa.Table, sums: ExpertEffectSums, sampling: SamplingAccumulator) -> pa.Table:
    """The criteria, and the estimated mean of every expert."""
    for (name, kind, unit, meaning), values in zip(_EXPERT_COLUMNS, _expert_columns(sums, sampling), strict=True):
        field = pa.field(name, kind, metadata={"unit": unit, "meaning": meaning})
        criteria = criteria.append_column(field, pa.array(values, kind))
    return criteria


_EXPERT_COLUMNS = (
    ("n_removals", pa.int64(), "removals", "removals of the expert that could be drawn"),
    ("n_drawn", pa.int64(), "removals", "those of them that were made"),
    ("mean_delta", pa.float64(), "nats", "estimated mean delta_loss over all n_removals; its intervals are in budgeted.csv"),
    ("mean_delta_se", pa.float64(), "nats", "its standard error, clustered by document: of documents and of what was drawn"),
)


def _expert_columns(sums: ExpertEffectSums, sampling: SamplingAccumulator) -> Iterator[np.ndarray]:
    means = sums.mean_delta()
    yield means["n_removals"]
    yield sampling.experts.n_drawn.ravel()
    yield means["mean_delta"]
    yield means["mean_delta_se"]


def _rows(
    effect: str,
    sums: ExpertEffectSums,
    audit: SavingAudit,
    sampling: SamplingAccumulator,
    tables: BudgetedTables,
    savings: pa.Table,
) -> Iterator[dict[str, Any]]:
    """The rows of one effect in budgeted.csv."""
    total, count = sums.sums(effect), sums.counts()
    variance = sampling.experts.variance(effect, tables.ratios[effect])
    n_drawn = sampling.experts.n_drawn
    pooled = [("all", total.sum(axis=(1, 2)), count.sum(axis=(1, 2)), variance.over(1).over(0), n_drawn.sum())]
    for axis, number in enumerate(tables.layers):
        own = SamplingVariance(variance.own[axis], variance.own_square[axis], variance.model[axis]).over(0)
        pooled.append((str(number), total[:, axis].sum(axis=1), count[:, axis].sum(axis=1), own, n_drawn[axis].sum()))
    for layer, by_document, n, own, drawn in pooled:
        row = {"effect": effect, "kind": "layer", "layer": layer, "name": "", "n_drawn": int(drawn)}
        yield row | _mean(by_document, n, own.moderated())
    documents = len(total)
    half = Z * np.sqrt(variance.moderated())
    quantile = float(scipy.stats.t.ppf(0.975, documents - 1)) if documents >= MINIMUM_PAIRS else np.nan
    wide = quantile * np.sqrt(variance.with_documents(total, count))
    for axis, expert in zip(*np.nonzero(count.sum(axis=0)), strict=True):
        n = count[:, axis, expert].sum()
        estimate = total[:, axis, expert].sum() / n
        yield {
            "effect": effect,
            "kind": "expert",
            "layer": str(tables.layers[axis]),
            "name": str(expert),
            "estimate": estimate,
            "sampling_low": estimate - half[axis, expert] / n,
            "sampling_high": estimate + half[axis, expert] / n,
            "low": estimate - wide[axis, expert] / n,
            "high": estimate + wide[axis, expert] / n,
            "n_drawn": n_drawn[axis, expert],
        }
    yield from _saving_rows(effect, audit, sampling, variance.over(1), tables, savings)


def _mean(total: np.ndarray, count: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """A mean over documents' sums, with both intervals."""
    interval = ratio_bootstrap(total[:, None], count[:, None])
    estimate, half = float(interval.estimate[0]), Z * float(np.sqrt(variance)) / count.sum()
    return {
        "estimate": estimate,
        "sampling_low": estimate - half,
        "sampling_high": estimate + half,
        "low": float(interval.low[0]),
        "high": float(interval.high[0]),
    }


def _saving_rows(
    effect: str,
    audit: SavingAudit,
    sampling: SamplingAccumulator,
    every: SamplingVariance,
    tables: BudgetedTables,
    savings: pa.Table,
) -> Iterator[dict[str, Any]]:
    """A saving counts each active expert by 1 / k, and the one pruned first by 1 / k - 1; its share, by that less share / k."""
    sums, k = audit.savings.sums(effect), audit.savings.sums(effect).slots.shape[-1]
    first = sampling.pruned_first.variance(effect, tables.ratios[effect]).over(2)
    written = {(row["layer"], row["ranking"]): row for row in savings.to_pylist() if row["effect"] == effect}
    for number, ranking in enumerate(audit.rankings):
        asked = sums.n[number].sum(axis=1) > 0
        known = np.flatnonzero(asked).tolist()
        groups = [(ALL_LAYERS, known), *((str(tables.layers[axis]), [axis]) for axis in known)] if known else []
        for layer, axes in groups:
            row = written.get((layer, ranking))
            if row is None:  # the exact effect as a ranking
                continue
            of_all, of_first = (
                SamplingVariance(
                    *(np.asarray(values[axes, *rest].sum()) for values in (v.own, v.own_square, v.model))
                ).moderated()
                for v, rest in ((every, ()), (first, (number,)))
            )
            n, random = sums.n[number, axes].sum(), sums.random[number, axes].sum()
            drawn = int(sampling.experts.n_drawn[axes].sum())
            for kind, share, scale in (("saving", 0.0, n), ("saving_share", row["saving_share"], random)):
                a = (1 - share) / k
                half = Z * np.sqrt(np.maximum(a * a * of_all + (1 - 2 * a) * of_first, 0.0)) / scale
                estimate = row[kind]
                yield {
                    "effect": effect,
                    "kind": kind,
                    "layer": layer,
                    "name": ranking,
                    "estimate": estimate,
                    "sampling_low": estimate - half,
                    "sampling_high": estimate + half,
                    "low": row[f"{kind}_low"],
                    "high": row[f"{kind}_high"],
                    "n_drawn": drawn,
                }
