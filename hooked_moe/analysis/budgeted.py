"""What a budgeted run says: means of layers and experts, and savings, each with two intervals.

    estimates.parquet, sampled_effects.parquet, draw.parquet  -> budgeted.csv, savings.csv, experts.parquet,
                                                                 expert_effect_sums.parquet
    routing.parquet, expert_weights.parquet                   -> criteria, in experts.parquet

The *sampling interval* holds what an exhaustive audit of these very documents would find. The *interval* holds what other
documents of the kind would say, as in an exhaustive audit. Estimated effects, summed by document, differ by both, what the
documents are and what was drawn in each (independently), so that nothing is left out: of layers it is the same bootstrap over
documents; of experts and savings, for which a few removals decide, t times the standard error, with a moderated variance of what
was drawn.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.accumulators.sampling import SamplingAccumulator
from hooked_moe.analysis.criteria import criteria_table
from hooked_moe.analysis.estimated_effects import DRAW, EFFECTS, ESTIMATES, SAMPLED, BudgetedTables
from hooked_moe.analysis.rankings import Scores
from hooked_moe.analysis.saving_table import ALL_LAYERS, SAVINGS, saving_table
from hooked_moe.analysis.savings import EXACT_KL, SavingAudit
from hooked_moe.statistics import ratio_bootstrap
from hooked_moe.statistics.difference_estimates import SamplingVariance, SavingVariance, Z, half_width_over_documents
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
    drawn = {effect: _saving_variance(effect, audit, sampling, tables) for effect in EFFECTS}
    savings = _without_orders(saving_table(audit, drawn=drawn))
    rows = [row for effect in EFFECTS for row in _rows(effect, sums, audit, sampling, tables, savings, drawn[effect])]
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
    drawn: SavingVariance,
) -> Iterator[dict[str, Any]]:
    """The rows of one effect in budgeted.csv."""
    total, count = sums.sums(effect), sums.counts()
    variance = sampling.experts.variance(effect, tables.ratios[effect])
    n_drawn = sampling.experts.n_drawn
    pooled = [("all", total.sum(axis=(1, 2)), count.sum(axis=(1, 2)), variance.over(1).over(0), n_drawn.sum())]
    for axis, number in enumerate(tables.layers):
        own = SamplingVariance(variance.own[axis], variance.own_square[axis], variance.model[axis]).over(0)
        pooled.append((str(number), total[:, axis].sum(axis=1), count[:, axis].sum(axis=1), own, n_drawn[axis].sum()))
    for layer, by_document, n, own, n_own in pooled:
        row = {"effect": effect, "kind": "layer", "layer": layer, "name": "", "n_drawn": int(n_own)}
        yield row | _mean(by_document, n, own.moderated())
    half = Z * np.sqrt(variance.moderated())
    wide = half_width_over_documents(total, count, variance.own, variance.moderated())
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
            "low": estimate - wide[axis, expert],
            "high": estimate + wide[axis, expert],
            "n_drawn": n_drawn[axis, expert],
        }
    yield from _saving_rows(effect, audit, sampling, tables, savings, drawn)


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


def _saving_variance(effect: str, audit: SavingAudit, sampling: SamplingAccumulator, tables: BudgetedTables) -> SavingVariance:
    """[ranking, layer], all layers together first: those that the ranking was asked about in."""
    slots, ratios = audit.savings.sums(effect).slots, tables.ratios[effect]
    asked = _asked(effect, audit)
    every = sampling.experts.variance(effect, ratios).over(1)
    first = sampling.pruned_first.variance(effect, ratios).over(2)

    def of_rankings(variance: SamplingVariance) -> SamplingVariance:
        """From [layer] or [layer, ranking]."""
        by_layer = (np.where(asked, values.T, 0.0) for values in (variance.own, variance.own_square, variance.model))
        return SamplingVariance(*(np.concatenate([x.sum(axis=1, keepdims=True), x], axis=1) for x in by_layer))

    return SavingVariance(of_rankings(every), of_rankings(first), slots.shape[-1])


def _asked(effect: str, audit: SavingAudit) -> Bool[np.ndarray, "ranking layer"]:
    """Where a ranking tells the experts of a layer apart, at any position."""
    return np.asarray(audit.savings.sums(effect).n.sum(axis=2) > 0)


def _saving_rows(
    effect: str,
    audit: SavingAudit,
    sampling: SamplingAccumulator,
    tables: BudgetedTables,
    savings: pa.Table,
    drawn: SavingVariance,
) -> Iterator[dict[str, Any]]:
    sums, asked = audit.savings.sums(effect), _asked(effect, audit)
    written = {(row["layer"], row["ranking"]): row for row in savings.to_pylist() if row["effect"] == effect}
    columns = (ALL_LAYERS, *map(str, tables.layers))
    shares = np.array(
        [[written.get((layer, ranking), {}).get("saving_share", np.nan) for layer in columns] for ranking in audit.rankings]
    )
    half = {kind: Z * np.sqrt(drawn.of(share)[1]) for kind, share in (("saving", 0.0), ("saving_share", shares))}
    for index, ranking in enumerate(audit.rankings):
        known = np.flatnonzero(asked[index]).tolist()
        groups = [(0, ALL_LAYERS, known), *((1 + axis, str(tables.layers[axis]), [axis]) for axis in known)] if known else []
        for number, layer, axes in groups:
            row = written.get((layer, ranking))
            if row is None:  # the exact effect as a ranking
                continue
            n_drawn = int(sampling.experts.n_drawn[axes].sum())
            for kind, total in (("saving", sums.n), ("saving_share", sums.random)):
                reach = half[kind][index, number] / total[index, axes].sum()
                yield {
                    "effect": effect,
                    "kind": kind,
                    "layer": layer,
                    "name": ranking,
                    "estimate": row[kind],
                    "sampling_low": row[kind] - reach,
                    "sampling_high": row[kind] + reach,
                    "low": row[f"{kind}_low"],
                    "high": row[f"{kind}_high"],
                    "n_drawn": n_drawn,
                }
