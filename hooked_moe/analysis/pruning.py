"""What removing experts for good will cost, and which cost least, read from an audit: nothing is pruned to find out.

An audit knows what every expert costs where it is active, one removal at a time. The sum of these over the experts of a mask, per
token, predicts the rise of the loss without them: its order over 14 criteria with Spearman .92 to 1.00 on each of the three
shipped models, its size within a factor that `pruning.csv` measures. Beyond a quarter of a layer's experts removals interact, and
the rise exceeds their sum.

    experts = choose_experts(run, 0.25, half="even")              # {layer: experts}, chosen by half of the documents
    predict_pruning(run, experts, half="odd")                     # what they cost on the other half, with an interval
    model.remove_experts(experts)

A mask must not be judged by the documents that it was chosen by: the experts that were cheapest there were lucky there.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.summed_effects import SummedEffects
from hooked_moe.checks import by_number, whole_number, whole_numbers
from hooked_moe.statistics import ratio_bootstrap
from hooked_moe.tables import Ledger, read_csv

Effect = Literal["kl", "delta_loss"]
Half = Literal["even", "odd"]
Per = Literal["layer", "model"]
ADDITIVE_SHARE = 0.25
"""Of a layer's experts; beyond it removals interact, and a sum of single removals falls short."""


@dataclass(frozen=True)
class PruningForecast:
    """The loss without the experts less the loss with them, in nats per token."""

    rise: float
    """`factor` times the sum of the single-token effects of the experts removed."""
    low: float
    """Lower end of the 95% interval of the sum, bootstrap over documents, times the factor; NaN with fewer than three."""
    high: float
    factor: float
    """Median of measured over summed, at this share of experts, from pruning.csv; 1 where that was not measured, or is stale."""
    share: float
    """Of the experts of the layers named, the largest share removed from one."""
    n_documents: int
    note: str
    """What limits the forecast; empty where nothing is known to."""


PRUNING_FILE = "pruning.csv"
_AS_IT_IS = "the sum of single removals as it is, which falls short by a tenth to a third at 25%"
BLIND = ("criterion", "random")
"""Kinds of prunings in pruning.csv that no effect had a part in."""


def predict_pruning(
    run: str | os.PathLike[str] | pa.Table,
    experts: Mapping[int, Iterable[int]],
    effect: Effect = "kl",
    *,
    half: Half | None = None,
) -> PruningForecast:
    """What removing these experts ({layer: experts}) will add to the loss, by the sum of their single-token effects.

    `run` is the directory of an analysed run, or the table expert_effect_sums.parquet of one. `half` takes every other document,
    so that experts chosen by one half are judged by the other. Files of a run are compared with their checksums at every call:
    give the table to ask often.

    Raises ValueError for layers that were not measured, for experts out of range or named twice, for an effect that the run
    lacks, and for a run that must be analysed again because its tables have changed since.
    """
    sums = SummedEffects.read(run, effect, half)
    chosen = np.zeros(sums.total.shape[1:], bool)
    for layer, removed in by_number(experts, "layer").items():
        chosen[sums.axis(layer), sums.checked(layer, removed)] = True
    if not chosen.any():
        raise ValueError("no expert is named; give {layer: experts}")
    total = np.where(chosen, sums.total, 0.0).sum(axis=(1, 2))
    interval = ratio_bootstrap(total[:, None], sums.n_positions[:, None].astype(np.float64))
    share = float(chosen.mean(axis=1).max())
    factor, reasons = _factor(run, share, effect)
    if share > ADDITIVE_SHARE:
        reasons.append(f"beyond {ADDITIVE_SHARE:.0%} of a layer's experts removals interact, and the rise exceeds their sum")
    rise, low, high = (factor * float(end[0]) for end in (interval.estimate, interval.low, interval.high))
    return PruningForecast(rise, low, high, factor, share, len(total), "; ".join(reasons))


def choose_experts(
    run: str | os.PathLike[str] | pa.Table,
    share: float,
    *,
    per: Per = "layer",
    effect: Effect = "kl",
    half: Half | None = "even",
    layers: Iterable[int] | None = None,
    keep: int | None = None,
) -> dict[int, list[int]]:
    """The experts whose removal costs least by an audit, `share` of each layer's (or of the whole model's): {layer: experts}.

    No better than REAP as far as is known: at 12.5 and 25% of every layer of the three shipped models (`hooked-moe prune`: chosen
    by 36 documents, loss on 36 others), the difference of the two costs has a 95% interval that contains 0 in five cases of six,
    and lies below 0 in one (tiny-qwen-moe, 12.5%). At 50%, where removals interact, it is cheaper on two models and dearer on
    tiny-qwen-moe, .42 against .33 nats.

    An expert's cost is its shrunk mean effect (`statistics.shrunk_means`) times how often it is active, from one half of the
    documents by default: judge the choice by the other (`predict_pruning(..., half="odd")`). `keep` experts remain in every
    layer at the least (default: as many as a token goes to). `run` and errors are as in `predict_pruning`.

    per="model" takes the cheapest of all layers together. It empties layers whose single removals are cheap, where removals
    interact, and was worse than the same share of every layer on the shipped models: check it on other documents before use.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is the part of the experts to remove, between 0 and 1, got {share}")
    sums = SummedEffects.read(run, effect, half)
    kept = sums.n_active if keep is None else whole_number(keep, "keep")
    axes = range(len(sums.layers)) if layers is None else [sums.axis(layer) for layer in whole_numbers(layers, "layers")]
    costs = np.stack([sums.cost(axis) for axis in axes])
    return lowest_experts([sums.layers[axis] for axis in axes], costs, share, per, kept)


def lowest_experts(
    layers: Sequence[int], scores: Float[np.ndarray, "layer expert"], share: float, per: Per, keep: int
) -> dict[int, list[int]]:
    """`share` of the experts with the lowest scores: of every layer's, or of all layers' together. At least `keep` remain."""
    n_experts = scores.shape[1]
    if per == "layer":
        n_removed = min(round(share * n_experts), n_experts - keep)
        removed = [np.argsort(score, kind="stable")[:n_removed] for score in scores]
    else:
        spared = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1) >= n_experts - keep  # the highest of each layer
        order = np.argsort(np.where(spared, np.inf, scores).ravel(), kind="stable")
        lowest = order[: min(round(share * scores.size), scores.size - int(spared.sum()))]
        removed = [lowest[lowest // n_experts == number] % n_experts for number in range(len(scores))]
    return {layer: sorted(part.tolist()) for layer, part in zip(layers, removed, strict=True) if len(part)}


def _factor(run: str | os.PathLike[str] | pa.Table, share: float, effect: str) -> tuple[float, list[str]]:
    """Median rise over summed effects at this share, interpolated between those measured; why it is 1 where it is.

    pruning.csv has a row per pruned model: share, rise, and the sum predicted_<effect> of what was removed. Rows count whose
    experts were chosen without seeing effects (by criteria and at random), the same share of every layer: sums that a mask was
    chosen by are too low.
    """
    path = None if isinstance(run, pa.Table) else Path(run) / PRUNING_FILE
    if path is None or not path.is_file():
        return 1.0, [f"no {PRUNING_FILE}: {_AS_IT_IS}"]
    fault = Ledger(path.parent).fault_of(PRUNING_FILE)
    if fault is not None:
        return 1.0, [f"{PRUNING_FILE} is not used ({fault}): {_AS_IT_IS}"]
    table = read_csv(path)
    measured, rise, predicted = (table[name].to_numpy().astype(float) for name in ("share", "rise", f"predicted_{effect}"))
    usable = (predicted > 0) & np.isin(table["kind"].to_numpy(), BLIND) & (table["per"].to_numpy() == "layer")
    shares = np.unique(measured[usable])
    if not len(shares):
        return 1.0, [f"pruning.csv has no row with predicted_{effect} above 0"]
    factors = [float(np.median((rise / predicted)[usable & (measured == one)])) for one in shares]
    reasons = [] if shares[0] <= share <= shares[-1] else [f"pruning.csv measured {shares[0]:.1%} to {shares[-1]:.1%} of experts"]
    return float(np.interp(share, shares, factors)), reasons
