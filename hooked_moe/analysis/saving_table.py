"""From sums over documents to savings.csv: costs, savings, their intervals and evidence, and what they amount to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from hooked_moe.analysis.accumulators.savings import SavingSums
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import ORACLE, family_of
from hooked_moe.analysis.savings import EXACT_KL, SavingAudit
from hooked_moe.statistics import NEGLIGIBLE_SHARE, holm, permutation_test, ratio_bootstrap, saving_outcome
from hooked_moe.statistics.difference_estimates import SavingVariance, half_width_over_documents

MINIMUM_DOCUMENTS = 10
"""Fewer give an interval, but no verdict: its level is not known to hold there."""
ALL_LAYERS = "all"

_TEXT, _COUNT, _NUMBER = pa.string(), pa.int64(), pa.float64()
_COLUMNS: tuple[tuple[str, pa.DataType, str, str], ...] = (
    ("effect", _TEXT, "text", "delta_loss (of the token that followed) or kl (expected over the model's own next token)"),
    ("layer", _TEXT, "text", "transformer block, counted from 0, or all: sums over positions and layers together"),
    ("ranking", _TEXT, "text", "a criterion, a per-token score, kl (the exact expected effect) or the oracle"),
    ("family", _TEXT, "text", "paper or extended: criteria, one number per expert; token: per-token scores; oracle"),
    (
        "direction",
        _TEXT,
        "text",
        "prune lowest, prune highest, or none published: then the lowest goes first, and either end counts",
    ),
    ("n_documents", _COUNT, "documents", "documents behind the row"),
    ("n_positions", _COUNT, "positions", "positions behind the row, those of every layer counted where all are pooled"),
    ("random_cost", _NUMBER, "nats", "mean effect of removing one of the active experts, each as likely"),
    ("lowest_cost", _NUMBER, "nats", "mean effect of removing the one that the ranking prunes first"),
    ("highest_cost", _NUMBER, "nats", "mean effect of removing the one that it prunes last"),
    ("saving", _NUMBER, "nats", "random_cost - lowest_cost"),
    ("saving_low", _NUMBER, "nats", "lower end of its 95% interval, bootstrap over documents"),
    ("saving_high", _NUMBER, "nats", "upper end"),
    ("saving_share", _NUMBER, "1", "saving / random_cost"),
    ("saving_share_low", _NUMBER, "1", "lower end of its 95% interval, both resampled together"),
    ("saving_share_high", _NUMBER, "1", "upper end"),
    ("mean_layer_share", _NUMBER, "1", "mean over layers of saving_share, each layer counting alike; rows of all layers only"),
    ("contrast_share", _NUMBER, "1", "(highest_cost - lowest_cost) / random_cost"),
    ("share_of_best", _NUMBER, "1", "saving / that of the oracle, the ranking by mean effect in other documents"),
    ("z", _NUMBER, "1", "saving in standard deviations of what the scores save when dealt to the experts at random"),
    ("p", _NUMBER, "1", "two-sided p of that permutation; NaN for per-token scores, which are no list over experts"),
    ("p_family", _NUMBER, "1", "p after Holm's correction over the criteria of this effect and layer"),
    ("outcome", _TEXT, "text", "helps, harms, negligible or undecided, by saving_share's interval and p_family (see note)"),
    ("within_slot_contrast", _NUMBER, "nats", "highest_cost - lowest_cost less what the picks' slots alone would make"),
    ("within_slot_contrast_low", _NUMBER, "nats", "lower end of its 95% interval, bootstrap over documents"),
    ("within_slot_contrast_high", _NUMBER, "nats", "upper end"),
    ("slot_share", _NUMBER, "1", "share of highest_cost - lowest_cost that the picks' slots make; NaN where that may be 0"),
    ("spearman", _NUMBER, "1", "within-position rank correlation of ranking and effect, mean over positions"),
    ("spearman_low", _NUMBER, "1", "lower end of its 95% interval, bootstrap over documents"),
    ("spearman_high", _NUMBER, "1", "upper end"),
    ("note", _TEXT, "text", "what was left out, or why there are no numbers; empty otherwise"),
)
SAVINGS = pa.schema([pa.field(name, kind, metadata={"meaning": m, "unit": unit}) for name, kind, unit, m in _COLUMNS])


def saving_table(
    audit: SavingAudit, bound: float = NEGLIGIBLE_SHARE, drawn: Mapping[str, SavingVariance] | None = None
) -> pa.Table:
    """One row per effect, layer (and all layers together) and ranking; the columns are those of SAVINGS.

    Where effects are estimates, `drawn` says how uncertain savings are by which removals were drawn, by effect [ranking, layer],
    all layers together first; the intervals of savings are then those of `half_width_over_documents`.
    """
    rows: list[dict[str, Any]] = []
    for effect in audit.effects:
        numbers = _numbers(audit.savings.sums(effect), None if drawn is None else drawn[effect])
        evidence = _evidence(audit, effect, numbers)
        for number, layer in enumerate((ALL_LAYERS, *map(str, audit.layers))):
            for index, ranking in enumerate(audit.rankings):
                if ranking == effect == EXACT_KL:
                    continue  # a ranking by the effect itself says nothing about rankings
                values = {name: column[index, number] for name, column in (numbers.columns | evidence).items()}
                row = {"effect": effect, "layer": layer, "ranking": ranking, **_identity(ranking), **values}
                rows.append(_judged(row, _note(audit, ranking, number - 1), bound))
    return pa.Table.from_pylist(rows, schema=SAVINGS)


@dataclass(frozen=True)
class _Numbers:
    columns: dict[str, np.ndarray]  # [ranking, layer], all layers together first
    saving: Float[np.ndarray, "ranking layer document"]


def _numbers(sums: SavingSums, drawn: SavingVariance | None) -> _Numbers:
    """Everything that the documents' sums determine."""
    saving, contrast = sums.random - sums.lowest, sums.highest - sums.lowest
    through_slots, within_slots = _by_slot(sums, contrast)
    pooled = {
        name: _with_all(values)
        for name, values in {
            "n": sums.n,
            "random": sums.random,
            "lowest": sums.lowest,
            "highest": sums.highest,
            "saving": saving,
            "contrast": contrast,
            "through": through_slots,
            "within": within_slots,
            "spearman": sums.spearman,
            "n_spearman": sums.n_spearman,
        }.items()
    }
    pairs = (("saving", "n"), ("saving", "random"), ("within", "n"), ("spearman", "n_spearman"), ("contrast", "n"))
    over, under = (np.stack([np.moveaxis(pooled[pair[side]], -1, 0) for pair in pairs], axis=1) for side in (0, 1))
    interval = ratio_bootstrap(over, under)
    if drawn is not None:
        for at, share in enumerate((0.0, interval.estimate[1])):  # of the first two pairs
            half = half_width_over_documents(over[:, at], under[:, at], *drawn.of(share))
            half[np.isnan(interval.low[at])] = np.nan
            interval.low[at], interval.high[at] = interval.estimate[at] - half, interval.estimate[at] + half
    total = {name: values.sum(axis=-1) for name, values in pooled.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "n_documents": (pooled["n"] > 0).sum(axis=-1),
            "n_positions": total["n"].astype(np.int64),
            **{f"{name}_cost": total[name] / total["n"] for name in ("random", "lowest", "highest")},
            "contrast_share": total["contrast"] / total["random"],
            "share_of_best": total["saving"] / np.where(total["saving"][-1] > 0, total["saving"][-1], np.nan),
            "slot_share": total["through"] / total["contrast"],
        }
    for at, name in enumerate(("saving", "saving_share", "within_slot_contrast", "spearman")):
        columns |= {name: interval.estimate[at], f"{name}_low": interval.low[at], f"{name}_high": interval.high[at]}
    certain = (interval.low[4] > 0) | (interval.high[4] < 0)
    columns["slot_share"] = np.where(certain, columns["slot_share"], np.nan)
    return _Numbers(columns, saving)


def _with_all(values: Float[np.ndarray, "ranking layer document"]) -> Float[np.ndarray, "ranking layer_or_all document"]:
    return np.concatenate([values.sum(axis=1, keepdims=True), values], axis=1)


def _by_slot(sums: SavingSums, contrast: Float[np.ndarray, "ranking layer document"]) -> tuple[np.ndarray, np.ndarray]:
    """The contrast of highest and lowest, by document: what the slots of the picks make of it, and the rest.

    Slot s costs m_s on average over all positions, so the picks' slots make sum_s m_s (times s held the highest - the lowest). Of
    the rest the mean over documents is exact, and its spread over documents allows for m_s being estimated from the same.
    """
    n_slot = sums.n_slot.sum(axis=1)[:, None]
    mean = np.divide(sums.slot_effect.sum(axis=1), n_slot, out=np.zeros_like(sums.slot_effect[:, 0]), where=n_slot > 0)
    through = np.einsum("rlds,ls->rld", sums.slots, mean)
    weight = sums.slots.sum(axis=2, dtype=np.float64) / np.maximum(n_slot, 1)
    deviation = sums.slot_effect - mean[:, None] * sums.n_slot[..., None]
    return through, contrast - through - np.einsum("rls,lds->rld", weight, deviation)


def _evidence(audit: SavingAudit, effect: str, numbers: _Numbers) -> dict[str, np.ndarray]:
    """z, p, p_family and mean_layer_share, [ranking, layer], all layers together first."""
    shape = numbers.columns["saving"].shape
    columns = {name: np.full(shape, np.nan) for name in ("z", "p", "p_family", "mean_layer_share")}
    observed = numbers.saving[:, :, audit.orders.chosen].sum(axis=-1)
    asked: Bool[np.ndarray, "ranking layer"] = numbers.columns["n_positions"][:, 1:] > 0
    for index, ranking in enumerate(audit.rankings):
        here = asked[index]
        if not here.any():
            continue
        columns["mean_layer_share"][index, 0] = numbers.columns["saving_share"][index, 1:][here].mean()
        if ranking not in audit.patterns:
            continue
        permuted = audit.orders.savings(effect, audit.patterns[ranking])
        for number in (0, *(1 + np.flatnonzero(here))):
            layers = here if number == 0 else np.arange(len(here)) == number - 1
            test = permutation_test(float(observed[index, layers].sum()), permuted[layers].sum(axis=0))
            columns["z"][index, number], columns["p"][index, number] = test.z, test.p
    criteria = [index for index, ranking in enumerate(audit.rankings) if ranking in CRITERIA]
    for number in range(shape[1]):
        tested = [index for index in criteria if not np.isnan(columns["p"][index, number])]
        columns["p_family"][tested, number] = holm(columns["p"][tested, number])
    oracle = audit.rankings.index(ORACLE)
    columns["p_family"][oracle] = columns["p"][oracle]
    return columns


def _identity(ranking: str) -> dict[str, str]:
    family = "token" if ranking == EXACT_KL else family_of(ranking)
    return {"family": family, "direction": CRITERIA[ranking].direction if ranking in CRITERIA else "prune lowest"}


def _note(audit: SavingAudit, ranking: str, axis: int) -> str:
    """What there is to say of a ranking in a layer; axis -1: of all layers."""
    if ranking in audit.absent:
        return f"not measured: the effect table has no column {ranking}"
    if why := audit.scores.unmeasured(ranking):
        return why
    if axis >= 0:
        return "the same for every active expert: it ranks nothing" if (ranking, axis) in audit.constant else ""
    left_out = [str(layer) for number, layer in enumerate(audit.layers) if (ranking, number) in audit.constant]
    return f"without layers {', '.join(left_out)}, where it is the same for every active expert" if left_out else ""


def _judged(row: dict[str, Any], note: str, bound: float) -> dict[str, Any]:
    """The row with its outcome, and a note that says why it has none."""
    reasons = [note] if note else []
    few = 0 < row["n_documents"] < MINIMUM_DOCUMENTS
    if few:
        reasons.append(f"{row['n_documents']} documents; a verdict needs {MINIMUM_DOCUMENTS}")
    elif row["n_documents"] == 0:
        reasons = reasons or ["no position where every active expert has a score"]
    elif np.isnan(row["saving_share_low"]):
        reasons.append("the cost of a random removal cannot be told from 0, so no share of it can")
    low, high = (np.nan, np.nan) if few else (row["saving_share_low"], row["saving_share_high"])
    return {**row, "outcome": saving_outcome(low, high, row["p_family"], bound), "note": "; ".join(reasons)}
