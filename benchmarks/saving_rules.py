"""How often the outcomes of savings are right, on effect tables where experts differ and the truth of every criterion is known.

What p-values over documents cannot be calibrated on: experts cost unequally, removals have the tails and the skew of real ones,
and a criterion that knows nothing is a list of numbers dealt to the experts at random. An expected effect is

    cost of the expert x cost of the slot x a mood of the document x a lognormal,

and a realised one adds luck whose variance grows with it. The population is one of few experts and layers, the same in every run;
documents are drawn again, and so are the numbers that nonsense deals.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import ORACLE, Scores
from hooked_moe.analysis.saving_table import saving_table
from hooked_moe.analysis.savings import SavingAudit
from hooked_moe.tables.effect_grid import EffectGrid

LAYERS, EXPERTS, SLOTS, TOKENS = 3, 24, 4, 30
TAIL, MOOD, LUCK = 1.5, 0.4, 0.25
"""Standard deviations of the logarithms of single effects and of documents' moods, and luck in nats^(1/2)."""
SLOT_COST = np.array([1.0, 0.3, 0.1, 0.05])
KNOWING, REVERSED, BARELY = "utilization_rate", "activation_norm", "mean_routing_weight_when_active"
NONSENSE = tuple(name for name in CRITERIA if name not in (KNOWING, REVERSED, BARELY))
EVERY = (KNOWING, REVERSED, BARELY, *NONSENSE)


@dataclass(frozen=True)
class Population:
    cost: np.ndarray  # [layer, expert], nats
    liking: np.ndarray  # [layer, expert]: how gladly the router selects it
    criteria: dict[str, np.ndarray]  # the three that are not dealt at random: [layer, expert]


@functools.cache
def population() -> Population:
    """Costs with the spread of real ones. The criterion that barely knows has ranks mixed with noise."""
    random = np.random.default_rng(5)
    cost = 0.05 * random.lognormal(0, 0.8, size=(LAYERS, EXPERTS))
    liking = random.normal(0, 0.7, size=cost.shape)
    barely = np.log(cost) + 2.5 * random.normal(size=cost.shape)
    return Population(cost, liking, {KNOWING: cost, REVERSED: -cost, BARELY: barely})


def drawn_documents(random: np.random.Generator, documents: int, *, expected_only: bool = False) -> EffectGrid:
    """Effects of the population's experts; `expected_only` has no luck, tails or moods: what they average to."""
    people, positions = population(), documents * TOKENS
    liking = people.liking + random.gumbel(size=(positions, LAYERS, EXPERTS))
    expert = np.argsort(-liking, axis=2)[:, :, :SLOTS]
    kl = people.cost[np.arange(LAYERS)[:, None], expert] * SLOT_COST
    if not expected_only:
        mood = MOOD * random.normal(size=(documents, LAYERS, 1))
        kl = kl * np.exp(np.repeat(mood, TOKENS, axis=0) - MOOD**2 / 2) * random.lognormal(-(TAIL**2) / 2, TAIL, size=kl.shape)
    delta = kl if expected_only else kl + LUCK * np.sqrt(kl) * random.normal(size=kl.shape)
    document, position = np.repeat(np.arange(documents), TOKENS), np.tile(np.arange(TOKENS), documents)
    valid = np.ones(positions, bool)
    return EffectGrid(document, position, tuple(range(LAYERS)), expert, delta.astype(np.float32), valid, kl=kl.astype(np.float32))


def savings(grid: EffectGrid, criteria: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, object]]:
    """The rows of all layers together for the loss, by ranking; a criterion that is not given is constant, and not tested."""
    sums = ExpertEffectSums(grid.layers, EXPERTS)
    sums.update(grid)
    columns = {name: criteria.get(name, np.ones((LAYERS, EXPERTS))).ravel().astype(float) for name in CRITERIA}
    keys = {"layer": np.repeat(np.arange(LAYERS), EXPERTS), "expert": np.tile(np.arange(EXPERTS), LAYERS)}
    scores = Scores(pa.table(keys | columns), sums, grid.layers)
    audit = SavingAudit(scores, sums, Documents(sums.documents()), SLOTS, len(grid.document), seed)
    audit.update(grid)
    rows = saving_table(audit).to_pylist()
    return {row["ranking"]: row for row in rows if (row["effect"], row["layer"]) == ("delta_loss", "all")}


@functools.cache
def true_shares() -> dict[str, float]:
    """Saving as a share of the random cost that each fixed criterion has in the population."""
    rows = savings(drawn_documents(np.random.default_rng(6), 3000, expected_only=True), population().criteria, 0)
    return {name: float(rows[name]["saving_share"]) for name in population().criteria}  # type: ignore[arg-type]


def told(documents: int, run: int, random: np.random.Generator) -> dict[str, float]:
    """What one run says: by criterion and outcome, whether its interval holds the truth, and what nonsense passes for."""
    nonsense = {name: random.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1) for name in NONSENSE}
    rows = savings(drawn_documents(random, documents), population().criteria | nonsense, run)
    said: dict[str, float] = {}
    for name in (KNOWING, BARELY, REVERSED, ORACLE):
        for outcome in ("helps", "harms", "negligible", "undecided"):
            said[f"{name}: {outcome}"] = float(rows[name]["outcome"] == outcome)
    for name, truth in true_shares().items():
        low, high = (float(rows[name][f"saving_share_{end}"]) for end in ("low", "high"))  # type: ignore[arg-type]
        said[f"{name}: interval misses"] = float(not low <= truth <= high)
    dealt = [rows[name] for name in NONSENSE]
    said["nonsense: p <= .05"] = float(np.mean([float(row["p"]) <= 0.05 for row in dealt]))  # type: ignore[arg-type]
    beyond = [float(row["saving_share_low"]) > 0.1 for row in dealt]  # type: ignore[arg-type]
    said["nonsense: interval beyond the bound"] = float(np.mean(beyond))
    said["nonsense: one helps"] = float(dealt[0]["outcome"] == "helps")
    for outcome in ("helps", "harms"):
        said[f"nonsense: any {outcome}"] = float(any(row["outcome"] == outcome for row in dealt))
    return said
