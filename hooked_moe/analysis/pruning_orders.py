"""In which order every ranking prunes the experts of a run, learned from some of its documents.

    criteria        in their published direction; where none is published, the lowest goes first
    mean_effect     lowest mean effect of a removal, shrunk: the oracle of a fixed ranking
    sum_effect      lowest sum of effects, unshrunk
    first_order     lowest sum of first-order estimates; first_order_curved: of those with the softmax's curvature
    table           what `choose_experts` chooses: lowest sum of expected effects, shrunk
    random          dealt by a seed

An expert that was never active in these documents (or too seldom for the criterion to be defined) goes first.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.criteria import CRITERIA, criteria_table
from hooked_moe.analysis.orders import oriented
from hooked_moe.analysis.pruning import Effect, Half, Per, choose_experts, lowest_experts
from hooked_moe.analysis.rankings import TOLD_THE_TOKEN, criterion_values
from hooked_moe.analysis.summed_effects import SUMS_FILE, SummedEffects, in_half
from hooked_moe.tables import read_parquet, required_file
from hooked_moe.tables.effect_grid import effect_chunks

ORACLES = ("mean_effect", "sum_effect", *TOLD_THE_TOKEN)
TABLE = "table"
RANKINGS = (*CRITERIA, *ORACLES, TABLE)
_COLUMNS = ("expert", "delta_loss", "routing_weight", "output_norm", *TOLD_THE_TOKEN)
_RANDOM = "random_"


@dataclass(frozen=True)
class Pruning:
    """Experts to remove, and by what they were chosen."""

    ranking: str
    kind: str
    """criterion, oracle, table, or random."""
    per: Per
    share: float
    experts: dict[int, list[int]]
    """{layer: experts}"""

    @property
    def seed(self) -> int | None:
        return seed_of(self.ranking)


def random_ranking(seed: int) -> str:
    return f"{_RANDOM}{seed}"


def seed_of(ranking: str) -> int | None:
    """The seed of a random ranking; None for any other."""
    number = ranking.removeprefix(_RANDOM)
    return int(number) if number != ranking and number.isdecimal() else None


class PruningOrders:
    """Scores of a run's experts by some of its documents; the lowest is pruned first."""

    def __init__(self, run: Path, n_experts: int, half: Half | None) -> None:
        """`half` None takes all documents. Raises FileNotFoundError for a run that was not analysed."""
        self.half = half
        self.sums = read_parquet(required_file(run, SUMS_FILE, "analysing the run writes it"))
        effects = SummedEffects.read(self.sums, "delta_loss", half)
        self.layers, self.n_active = effects.layers, effects.n_active
        self.effect: Effect = "kl" if "sum_kl" in self.sums.column_names else "delta_loss"
        criteria, estimates = _statistics(run, n_experts, half)
        self._scores: dict[str, Float[np.ndarray, "layer expert"]] = {}
        for name, values in criterion_values(criteria).items():
            by_layer = oriented(values, CRITERIA[name].direction == "prune highest")
            self._scores[name] = np.stack([by_layer[layer] for layer in self.layers])
        means = np.stack([effects.means(axis) for axis in range(len(self.layers))])
        self._scores["mean_effect"] = np.where(effects.count.sum(axis=0) > 0, means, np.nan)
        self._scores["sum_effect"] = effects.total.sum(axis=0)
        self._scores |= estimates

    def missing(self, ranking: str) -> str:
        """Why nothing can be pruned by a ranking; empty where it can."""
        values = self._scores.get(ranking)
        if values is None or not np.isnan(values).all():
            return ""
        source = CRITERIA[ranking].measured_in if ranking in CRITERIA else "first-order estimates"
        return f"not measured: this run has no {source}"

    def prune(self, ranking: str, share: float, per: Per) -> Pruning:
        """`share` of every layer's experts, or of the model's. Raises ValueError for a share that takes none or too many."""
        check_share(share, self.n_experts, self.n_active)
        if ranking == TABLE:
            chosen = choose_experts(self.sums, share, per=per, effect=self.effect, half=self.half)
            return Pruning(ranking, "table", per, share, chosen)
        seed = seed_of(ranking)
        if seed is not None:
            scores, kind = np.random.default_rng([seed, *self._shape]).random(self._shape), "random"
        else:
            values = self._scores[ranking]
            scores, kind = np.where(np.isnan(values), -np.inf, values), "criterion" if ranking in CRITERIA else "oracle"
        return Pruning(ranking, kind, per, share, lowest_experts(self.layers, scores, share, per, self.n_active))

    @property
    def _shape(self) -> tuple[int, int]:
        n_layers, n_experts = self._scores["sum_effect"].shape
        return n_layers, n_experts

    @property
    def n_experts(self) -> int:
        return self._shape[1]


def check_share(share: float, n_experts: int, n_active: int) -> None:
    """Raise ValueError where a share of a layer's experts is none, or leaves fewer than a token goes to."""
    if not 1 <= round(share * n_experts) <= n_experts - n_active:
        raise ValueError(
            f"a share of {share:g} is {round(share * n_experts)} of a layer's {n_experts} experts, and a token goes to "
            f"{n_active}: give a share that removes from 1 to {n_experts - n_active}"
        )


def _statistics(run: Path, n_experts: int, half: Half | None) -> tuple[pa.Table, dict[str, Float[np.ndarray, "layer expert"]]]:
    """The table of criteria, and the sums of first-order estimates (NaN without them), over these documents."""
    experts: ExpertAccumulator | None = None
    path = required_file(run, "effects.parquet", "the measurement writes it")
    for whole in effect_chunks(path, _COLUMNS):
        chunk = whole.at_positions(in_half(whole.document, half))
        if experts is None:
            experts = ExpertAccumulator(whole.layers, n_experts)
            sums = {name: np.zeros((len(whole.layers), n_experts)) for name in TOLD_THE_TOKEN}
        if not len(chunk.document):
            continue
        experts.update(chunk)
        measured = chunk.measured()
        for name, axis in product(TOLD_THE_TOKEN, range(len(whole.layers))):
            values = getattr(measured, name)
            if values is None:
                sums[name][axis] = np.nan
            else:
                sums[name][axis] += np.bincount(measured.expert[:, axis].ravel(), values[:, axis].ravel(), n_experts)
    assert experts is not None  # effect_chunks refuses an empty table
    routing = run / "routing.parquet"
    weights = run / "expert_weights.parquet"
    of_half = _rows_of(routing, half) if routing.is_file() else None
    return criteria_table(experts.statistics(of_half, weights if weights.is_file() else None)), sums


def _rows_of(path: Path, half: Half | None) -> pa.Table:
    table = read_parquet(path)
    return table.filter(pa.array(in_half(table["document"].to_numpy(), half)))
