"""Made-up tables behind the report's verdict, with a known truth: what each criterion saves, and what a pruning costs.

A scenario says what each criterion truly saves (as a share of the random cost) and how much data there is. Estimates scatter
around the truth, and the outcomes follow from their definition, so a sentence of the report can be held against the truth.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hooked_moe.analysis.criteria import CRITERIA, EXTENDED_CRITERIA, PAPER_CRITERIA
from hooked_moe.analysis.rankings import ORACLE, TOKEN_LADDER

RANDOM_COST = 0.0144  # nats of removing a random active expert
MARGIN = 0.1  # savings within this share of the random cost are negligible
EFFECTS = {"delta_loss": 1.0, "kl": 0.5}  # the width of intervals, as a multiple of that of the loss

HELPFUL = {
    "reap": 0.62,
    "weighted_ean": 0.6,
    "mean_routing_weight_when_active": 0.55,
    "weighted_frequency": 0.5,
    "activation_std": 0.4,
    "routing_entropy": -0.4,
}
PER_TOKEN = {"routing_weight": 0.98, "gap_norm": 0.99, "first_order": 0.9, "first_order_curved": 0.85}


@dataclass(frozen=True)
class Scenario:
    """True savings by criterion (0 for those not named), the number of documents, how they scatter, and what permutation says."""

    truth: dict[str, float] = field(default_factory=dict)
    n_documents: int = 72
    scatter: float = 1.0
    """Of single documents, as a multiple of the usual."""
    by_chance: bool = False
    """Whether criteria with permuted scores save as much: few experts differ by much."""


SCENARIOS = {
    "helpful": Scenario(HELPFUL),
    "nonsense": Scenario(),
    "reversed": Scenario({"coactivation": -0.5}),
    "too little data": Scenario(HELPFUL, n_documents=2, scatter=4.0),
    "by chance": Scenario(HELPFUL, by_chance=True),
}


def outcome_of(low: float, high: float, p_family: float) -> str:
    """The definition: an interval beyond the margin and a permutation that agrees, an interval inside, or neither."""
    if low > MARGIN and p_family <= 0.05:
        return "helps"
    if high < -MARGIN and p_family <= 0.05:
        return "harms"
    return "negligible" if low > -MARGIN and high < MARGIN else "undecided"


def savings_rows(scenario: Scenario, n_layers: int) -> list[dict[str, Any]]:
    """savings.csv of a scenario."""
    random = np.random.default_rng(11)
    rankings = [(name, "paper", scenario.truth.get(name, 0.0)) for name in PAPER_CRITERIA]
    rankings += [(name, "extended", scenario.truth.get(name, 0.0)) for name in EXTENDED_CRITERIA]
    rankings += [(name, "token", PER_TOKEN[name]) for name in TOKEN_LADDER]
    rankings += [("kl", "token", 0.95), (ORACLE, "oracle", 0.65)]
    rows = []
    for effect, width in EFFECTS.items():
        for layer in ("all", *map(str, range(n_layers))):
            for ranking, family, truth in rankings:
                if ranking == effect:
                    continue  # it would rank itself
                reach = width * scenario.scatter * 0.04 * np.sqrt(72 / scenario.n_documents) * (1 if layer == "all" else 1.5)
                share = truth + 0.4 * reach * random.uniform(-1, 1)
                rows.append(_row(scenario, effect, layer, ranking, family, share, reach))
    return rows


def _row(scenario: Scenario, effect: str, layer: str, ranking: str, family: str, share: float, reach: float) -> dict[str, Any]:
    fixed = family in ("paper", "extended")
    z = float(10 * share / (1 + 4 * reach)) if fixed else np.nan
    p_family = (0.4 if scenario.by_chance or abs(z) < 2 else 1 / 201) if fixed else np.nan
    direction = "prune highest" if ranking == "aimer" else "none published" if ranking == "coactivation" else "prune lowest"
    saving = RANDOM_COST * share
    spearman = (0.02 if effect == "delta_loss" else 0.5) * share
    return {
        "effect": effect,
        "layer": layer,
        "ranking": ranking,
        "family": family,
        "direction": direction if fixed else "prune lowest",
        "n_documents": scenario.n_documents,
        "n_positions": scenario.n_documents * 511,
        "random_cost": RANDOM_COST,
        "lowest_cost": RANDOM_COST - saving,
        "highest_cost": RANDOM_COST + 1.2 * saving,
        "saving": saving,
        "saving_low": saving - RANDOM_COST * reach,
        "saving_high": saving + RANDOM_COST * reach,
        "saving_share": share,
        "saving_share_low": share - reach,
        "saving_share_high": share + reach,
        "mean_layer_share": share if layer == "all" else np.nan,
        "contrast_share": 2.2 * share,
        "share_of_best": share / 0.65,
        "z": z,
        "p": p_family / 2,
        "p_family": p_family,
        "outcome": outcome_of(share - reach, share + reach, p_family if fixed else 0.0),
        "within_slot_contrast": 0.1 * saving,
        "within_slot_contrast_low": 0.1 * saving - 0.002,
        "within_slot_contrast_high": 0.1 * saving + 0.002,
        "slot_share": 0.9,
        "spearman": spearman,
        "spearman_low": spearman - 0.01,
        "spearman_high": spearman + 0.01,
        "note": "",
    }


SHARES = (0.125, 0.25, 0.5)
FACTOR = {0.125: 1.1, 0.25: 1.3, 0.5: 1.8}  # measured over predicted rise: interactions grow with the share


def pruning_rows(scenario: Scenario) -> list[dict[str, Any]]:
    """pruning.csv: each criterion costs less than random by about what it saves; the prediction is low by a known factor."""
    random = np.random.default_rng(12)
    rows = []
    for share in SHARES:
        cost = 2.4 * share**1.3
        names = [(name, "criterion", 1 - 1.3 * scenario.truth.get(name, 0.0)) for name in CRITERIA]
        names += [(f"random_{i}", "random", 1.0) for i in range(5)] + [("mean_effect", "oracle", 0.15)]
        for ranking, kind, relative in names:
            rise = max(0.05, relative) * cost * random.uniform(0.95, 1.05)
            rows.append(
                {
                    "ranking": ranking,
                    "per": "layer",
                    "share": share,
                    "n_documents": 36,
                    "rise": rise,
                    "rise_low": 0.85 * rise,
                    "rise_high": 1.15 * rise,
                    "random_rise": cost,
                    "share_of_random": rise / cost,
                    "predicted": rise / FACTOR[share],
                    "predicted_low": 0.9 * rise / FACTOR[share],
                    "predicted_high": 1.1 * rise / FACTOR[share],
                    "kind": kind,
                }
            )
    return rows


def pruning_summary_rows() -> list[dict[str, Any]]:
    """pruning_summary.csv, as the rows of `pruning_rows` have it."""
    return [
        {"share": share, "population": population, "spearman": spearman, "ratio": FACTOR[share], "coverage": 0.9 - share}
        for share in SHARES
        for population, spearman in (("criteria", 0.97), ("random masks", 0.8))
    ]


def reread_rows() -> list[dict[str, Any]]:
    """reread.csv: one model whose pooled difference is shown, and one that says nothing either way."""
    rows = []
    for model, difference, reach, p in (("DeepSeek-V2-Lite", 0.0125, 0.006, 0.0002), ("OLMoE-1B-7B", 0.001, 0.009, 0.82)):
        for metric in (*PAPER_CRITERIA, "all"):
            wide = reach if metric == "all" else 2 * reach
            rows.append(
                {
                    "model": model,
                    "metric": metric,
                    "n_paragraphs": 99,
                    "high": 0.0024 + difference,
                    "low": 0.0024,
                    "difference": difference,
                    "difference_low": difference - wide,
                    "difference_high": difference + wide,
                    "p_sign_flip": p if metric == "all" else min(1.0, 100 * p),
                    "p_t": p if metric == "all" else min(1.0, 80 * p),
                }
            )
    return rows
