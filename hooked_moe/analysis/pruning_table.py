"""What prunings cost beside what the effect table said they would: pruning.csv and pruning_summary.csv."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy
from jaxtyping import Float, Int

from hooked_moe.analysis.pruning import BLIND, Effect, Half, predict_pruning
from hooked_moe.analysis.pruning_orders import Pruning
from hooked_moe.statistics import MINIMUM_PAIRS, ratio_bootstrap

REFERENCE = "reap"
"""The criterion that every ranking is compared with, document by document."""

_TEXTS, _INTEGERS = ("ranking", "kind", "per"), ("n_documents", "n_tokens", "seed")
_NUMBERS = (
    *("share", "rise", "rise_low", "rise_high", "random_rise", "share_of_random"),
    *("predicted", "predicted_low", "predicted_high", "predicted_kl", "predicted_delta_loss"),
    *("less_reap", "less_reap_low", "less_reap_high"),
)
_ORDER = (
    *("ranking", "kind", "per", "share", "seed", "n_documents", "n_tokens", "rise", "rise_low", "rise_high", "random_rise"),
    *("share_of_random", "predicted", "predicted_low", "predicted_high", "predicted_kl", "predicted_delta_loss"),
    *("less_reap", "less_reap_low", "less_reap_high"),
)
_TYPES = {name: pa.string() for name in _TEXTS} | {name: pa.int64() for name in _INTEGERS} | dict.fromkeys(_NUMBERS, pa.float64())
PRUNING = pa.schema([(name, _TYPES[name]) for name in _ORDER])


@dataclass(frozen=True)
class MeasuredLosses:
    """Losses of the documents of an evaluation, summed over their tokens, intact and under each pruning."""

    n_positions: Int[np.ndarray, " document"]
    intact: Float[np.ndarray, " document"]
    pruned: Float[np.ndarray, "pruning document"]
    tokens_per_document: int


def pruning_table(prunings: Sequence[Pruning], losses: MeasuredLosses, sums: pa.Table, half: Half | None) -> pa.Table:
    """A row per pruning: its rise in nats per token, and the sum of the single-token effects of what it removes.

    `sums` is expert_effect_sums.parquet, `half` the documents that predictions are made from. `predicted` is the sum of expected
    effects (of realised ones in runs that lack them). Intervals are over documents, those measured and those predicted from.
    `less_reap` is the rise less that of pruning by REAP, with an interval that pairs documents.
    """
    rise = losses.pruned - losses.intact
    n = losses.n_positions[:, None].astype(np.float64)
    whole = ratio_bootstrap(rise.T, n)
    number = {(one.ranking, one.per, one.share): index for index, one in enumerate(prunings)}
    reference = [number.get((REFERENCE, one.per, one.share)) for one in prunings]
    against = np.stack(
        [np.zeros_like(own) if other is None else own - rise[other] for own, other in zip(rise, reference, strict=True)]
    )
    paired = ratio_bootstrap(against.T, n)
    rows: list[dict[str, Any]] = []
    for index, one in enumerate(prunings):
        same = [i for i, other in enumerate(prunings) if (other.kind, other.per, other.share) == ("random", one.per, one.share)]
        random = float(whole.estimate[same].mean()) if same else np.nan
        row = {"ranking": one.ranking, "kind": one.kind, "per": one.per, "share": one.share, "seed": one.seed}
        row |= {"n_documents": len(losses.intact), "n_tokens": losses.tokens_per_document}
        row |= {"rise": whole.estimate[index], "rise_low": whole.low[index], "rise_high": whole.high[index]}
        row |= {"random_rise": random, "share_of_random": whole.estimate[index] / random}
        row |= _predicted(one, sums, half)
        ends = (paired.estimate[index], paired.low[index], paired.high[index])
        compared = reference[index] not in (None, index)
        row |= dict(zip(("less_reap", "less_reap_low", "less_reap_high"), ends if compared else (np.nan,) * 3, strict=True))
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PRUNING)


def _predicted(pruning: Pruning, sums: pa.Table, half: Half | None) -> dict[str, float]:
    """From a table, not from a run: the plain sum, without the factor that these very rows are to give."""
    effects: tuple[Effect, ...] = ("kl", "delta_loss")
    forecasts = {
        effect: predict_pruning(sums, pruning.experts, effect, half=half)
        for effect in effects
        if f"sum_{effect}" in sums.column_names
    }
    first = forecasts.get("kl") or forecasts["delta_loss"]
    by_effect = {f"predicted_{effect}": forecasts[effect].rise if effect in forecasts else np.nan for effect in effects}
    return {"predicted": first.rise, "predicted_low": first.low, "predicted_high": first.high, **by_effect}


def pruning_summary(prunings: pa.Table) -> pa.Table:
    """How well predictions do, at each share, over the criteria and over random masks.

    spearman is the rank correlation of predicted and measured rise (NaN for fewer than three prunings), ratio the median of
    measured over predicted, and coverage the share of prunings whose measured rise lies in the predicted interval times a factor,
    the ratio over both populations, which `predict_pruning` applies. The factor comes from these same prunings.
    """
    rows = []
    everything = prunings.to_pylist()
    for per, share in sorted({(row["per"], row["share"]) for row in everything}):
        here = [row for row in everything if (row["per"], row["share"]) == (per, share)]
        factor = _ratio([row for row in here if row["kind"] in BLIND])
        for kind, population in (("criterion", "criteria"), ("random", "random masks")):
            own = [row for row in here if row["kind"] == kind]
            if not own:
                continue
            rise, predicted, low, high = (
                np.array([row[name] for row in own]) for name in ("rise", "predicted", "predicted_low", "predicted_high")
            )
            inside = (factor * low <= rise) & (rise <= factor * high)
            enough = len(own) >= MINIMUM_PAIRS and np.ptp(rise) > 0 and np.ptp(predicted) > 0
            rows.append(
                {
                    "share": share,
                    "population": population if per == "layer" else f"{population}, over all layers at once",
                    "n": len(own),
                    "spearman": float(scipy.stats.spearmanr(predicted, rise).statistic) if enough else np.nan,
                    "ratio": _ratio(own),
                    "coverage": np.nan if np.isnan(low).any() else float(inside.mean()),
                }
            )
    return pa.Table.from_pylist(rows)


def _ratio(rows: Sequence[dict[str, Any]]) -> float:
    ratios = [row["rise"] / row["predicted"] for row in rows if row["predicted"] > 0]
    return float(np.median(ratios)) if ratios else np.nan
