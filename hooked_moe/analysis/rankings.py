"""What ranks the active experts of a position: criteria fixed for the corpus, the token's own scores, and an oracle.

Families are tested, and corrected for, apart:
  paper     the four criteria of arXiv 2606.10703, over criteria x layers
  extended  the criteria that others prune by, over criteria x layers
  token     a ladder of per-token scores, the controls: each by itself, over layers
  oracle    the mean effects of the experts in other documents, over layers: the best fixed ranking that these could teach
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.oracle import fold_of, oracle_scores
from hooked_moe.analysis.orders import oriented
from hooked_moe.tables import read_parquet
from hooked_moe.tables.effect_grid import EffectGrid, TableOrPath

Family = Literal["paper", "extended", "token", "oracle"]
FAMILIES: tuple[Family, ...] = get_args(Family)

ROUTING_WEIGHT = "routing_weight"
"""The paper's control: the only score of its that is the token's own."""
TOKEN_LADDER = {
    ROUTING_WEIGHT: "the token's own routing weight",
    "gap_norm": "the token's own gap norm",
    "first_order": "first-order estimate",
    "first_order_curved": "first-order estimate with the softmax's curvature",
}
"""Columns of the effect table, each closer to the loss change than the one before: g, g ||E||, -g E . dloss/dy, that curved."""
TOLD_THE_TOKEN = ("first_order", "first_order_curved")
"""Scores that know the token that followed, which no criterion does."""
ORACLE = "oracle"


def rankings() -> tuple[str, ...]:
    """All that is asked about, those criteria included that a user has entered, in the order of every table."""
    return (*CRITERIA, *TOKEN_LADDER, ORACLE)


def family_of(ranking: str) -> Family:
    if ranking in CRITERIA:
        return CRITERIA[ranking].family
    return "oracle" if ranking == ORACLE else "token"


def corrected_together(ranking: str) -> tuple[str, ...]:
    """The rankings whose cells, over all layers, make up one family of tests with this one's."""
    family = family_of(ranking)
    return tuple(name for name in CRITERIA if CRITERIA[name].family == family) or (ranking,)


class Scores:
    """The score that each ranking gives each active expert, in the layers asked for."""

    def __init__(self, criteria: TableOrPath, sums: ExpertEffectSums, layers: Sequence[int]) -> None:
        """`criteria` has columns layer, expert and one per name in CRITERIA; `sums` are over all documents."""
        self._values = {
            name: oriented(by_layer, CRITERIA[name].direction == "prune highest")
            for name, by_layer in criterion_values(criteria).items()
        }
        self.layers = tuple(layers)
        self._oracles = oracle_scores(sums, "delta_loss")[[sums.layers.index(layer) for layer in self.layers]]
        self._absent: set[str] = set()  # token scores whose columns the chunks seen so far lack

    def unmeasured(self, ranking: str) -> str:
        """Why a ranking cannot be asked about; empty where it can."""
        if ranking in CRITERIA and not any(is_measured(ranking, values) for values in self._values[ranking].values()):
            return f"not measured: this run has no {CRITERIA[ranking].measured_in}"
        if ranking in self._absent:
            return f"not measured: the effect table has no column {ranking}"
        return ""

    def by_expert(self, criterion: str, layer: int) -> Float[np.ndarray, " expert"]:
        """A criterion's scores in its published direction: the lowest is pruned first."""
        return self._values[criterion][layer]

    def of(self, chunk: EffectGrid, layer: int) -> Iterator[tuple[str, Float[np.ndarray, "position slot"] | None]]:
        """Every ranking in the order of `rankings()`, with its scores at a chunk's positions; None where it was not measured.

        Criteria are in their published direction: the expert that is pruned first has the lowest score.
        """
        axis = chunk.layer_axis(layer)
        expert = chunk.expert[:, axis]
        for name, by_layer in self._values.items():
            if layer not in by_layer or (len(expert) and (expert.min() < 0 or expert.max() >= len(by_layer[layer]))):
                known = f"has {len(by_layer[layer])} experts" if layer in by_layer else "has no row"
                raise ValueError(f"the table of criteria {known} in layer {layer}; effects go up to expert {expert.max()}")
            yield name, None if self.unmeasured(name) else by_layer[layer][expert]
        for name in TOKEN_LADDER:
            values = getattr(chunk, name)
            if values is None:
                self._absent.add(name)
            yield name, None if values is None else values[:, axis].astype(np.float64)
        oracle = self._oracles[self.layers.index(layer)]
        yield ORACLE, oracle[fold_of(chunk.document)[:, None], expert]


def is_measured(criterion: str, values: Float[np.ndarray, " expert"]) -> bool:
    """Whether the file was there that a criterion comes from: what it leaves is undefined for every expert without it."""
    return CRITERIA[criterion].measured_in == "effects.parquet" or not bool(np.isnan(values).all())


def criterion_values(criteria: TableOrPath) -> dict[str, dict[int, Float[np.ndarray, " expert"]]]:
    """Criterion name -> layer -> value per expert. Raises ValueError for absent columns and absent or repeated experts."""
    table = criteria if isinstance(criteria, pa.Table) else read_parquet(criteria)
    missing = [name for name in ("layer", "expert", *CRITERIA) if name not in table.column_names]
    if missing:
        raise ValueError(f"not a table of criteria: column {', '.join(missing)} missing; it has {table.column_names}")
    layer, expert = (table.column(name).to_numpy().astype(np.int64) for name in ("layer", "expert"))
    result: dict[str, dict[int, np.ndarray]] = {name: {} for name in CRITERIA}
    for number in np.unique(layer):
        rows = np.flatnonzero(layer == number)
        rows = rows[np.argsort(expert[rows], kind="stable")]
        if not np.array_equal(expert[rows], np.arange(len(rows))):
            raise ValueError(f"layer {number} of the criteria must have each expert once, counted from 0")
        for name in CRITERIA:
            result[name][int(number)] = table.column(name).to_numpy()[rows].astype(np.float64)
    return result
