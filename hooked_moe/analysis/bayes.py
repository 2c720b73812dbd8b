"""The rankings compared as models of the order of the active experts: bayes.csv.

Each ranking predicts, at every position and layer, the order of the active experts by what their removal costs (a
Plackett-Luce choice with one coefficient for all layers). They are compared by the Bayes factor of the coefficient against
0, by how well each predicts documents it was not fitted to, and by the weights with which their predictions are best mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from hooked_moe import statistics
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import Scores, family_of, rankings
from hooked_moe.statistics import DegenerateSample
from hooked_moe.tables.effect_grid import EffectGrid

MAXIMUM_ORDERS = 1 << 14
"""Orders (positions x layers) that the models are fitted to; of a longer corpus every n-th position is taken."""
CHANCE = "chance"


class ChoiceData:
    """Every `stride`-th measured position with the scores of all rankings, in memory that the corpus does not enlarge."""

    def __init__(self, scores: Scores, n_measured: int, n_layers: int) -> None:
        self.scores = scores
        self.n_available = n_measured
        self.stride = max(1, -(-n_measured * n_layers // MAXIMUM_ORDERS))
        self._seen = 0
        self._document: list[np.ndarray] = []
        self._delta: list[np.ndarray] = []  # [P, L, K] of each chunk
        self._scores: dict[str, list[np.ndarray]] = {name: [] for name in rankings()}

    def update(self, measured: EffectGrid) -> None:
        kept = np.flatnonzero((self._seen + np.arange(len(measured.document))) % self.stride == 0)
        self._seen += len(measured.document)
        chosen = measured.at_positions(kept)
        axes = [chosen.layer_axis(layer) for layer in self.scores.layers]
        self._document.append(chosen.document)
        self._delta.append(chosen.delta_loss[:, axes])
        by_layer = [dict(self.scores.of(chosen, layer)) for layer in self.scores.layers]
        for name, parts in self._scores.items():
            columns = [scores[name] for scores in by_layer]
            measured_here = [column for column in columns if column is not None]
            if measured_here:
                parts.append(np.stack(measured_here, axis=1))

    def table(self) -> pa.Table:
        """One row per ranking, and one for chance, the model without any.

        pl_beta: log odds per standard deviation of the score's rank within the position; pl_sd: its error, clustered by
        document; pl_bf10: Savage-Dickey Bayes factor of beta against 0, and its logarithm; lodo_score: mean log score of the
        orders of left-out documents less that of chance, nats per order; stacking_weight: of the fixed criteria and chance,
        mixed document by document. The token scores and the oracle are not mixed: they would leave nothing to tell the criteria
        apart by. `note` says what has no numbers, and why.
        """
        document, delta = np.concatenate(self._document), np.concatenate(self._delta)
        scores = {name: np.concatenate(parts) for name, parts in self._scores.items() if parts}
        fits: dict[str, _Fit] = {}
        notes = {name: self.scores.unmeasured(name) for name in rankings()}
        for name in rankings():
            if notes[name]:
                continue
            defined = np.isfinite(scores[name]).all(axis=(1, 2))
            try:
                fits[name] = _fit(scores[name][defined], delta[defined], document[defined])
            except DegenerateSample as reason:
                notes[name] = str(reason)
        weights = _stacked({name: fit.held_out for name, fit in fits.items() if name in CRITERIA})
        rows = []
        for name in (*rankings(), CHANCE):
            fit = fits.get(name, _NO_FIT)
            model = fit.model
            rows.append(
                {
                    "family": CHANCE if name == CHANCE else family_of(name),
                    "criterion": name,
                    "pl_beta": model.beta,
                    "pl_sd": model.sd,
                    "pl_bf10": model.bf10,
                    "pl_log_bf10": model.log_bf10,
                    "lodo_score": 0.0 if name == CHANCE else fit.gain,
                    "stacking_weight": weights.get(name, np.nan),
                    "n_positions_used": fit.n_positions,
                    "n_positions_available": self.n_available,
                    "n_layers": delta.shape[1],
                    "n_orders_tied": model.n_tied,
                    "note": notes.get(name, ""),
                }
            )
        return pa.Table.from_pylist(rows)


@dataclass(frozen=True)
class _Fit:
    model: statistics.PlackettLuce
    held_out: statistics.DocumentScores
    n_positions: int

    @property
    def gain(self) -> float:
        """Held-out log score less that of chance, nats per order."""
        if not self.n_positions:
            return np.nan
        return float(np.sum(self.held_out.log_score - self.held_out.chance) / self.model.n_positions)


_NOTHING = np.zeros(0)
_NO_FIT = _Fit(
    statistics.PlackettLuce(np.nan, np.nan, np.nan, n_positions=0, n_tied=0, n_documents=0),
    statistics.DocumentScores(_NOTHING.astype(np.int64), _NOTHING, _NOTHING),
    n_positions=0,
)


def _fit(score: Float[np.ndarray, "P L K"], delta: Float[np.ndarray, "P L K"], document: Int[np.ndarray, " P"]) -> _Fit:
    """One coefficient for all layers, of the score's ranks within each position: all rankings on one scale, without tails."""
    if not len(score):
        raise DegenerateSample("undefined at every position")
    n_layers, n_slots = score.shape[1:]
    ranks = [statistics.standardised(statistics.within_position_ranks(score[:, axis])) for axis in range(n_layers)]
    stacked = np.stack(ranks, axis=1).reshape(-1, n_slots)
    orders, documents = delta.reshape(-1, n_slots), np.repeat(document, n_layers)
    fit = statistics.fit_choices(stacked, orders, documents)
    return _Fit(fit.model(), fit.held_out(), len(score))


def _stacked(held_out: dict[str, statistics.DocumentScores]) -> dict[str, float]:
    """Weights of the models and of chance, over the documents that all of them predict in full."""
    if not held_out:
        return {}
    documents, counts = _common([(one.document, one.chance) for one in held_out.values()])
    if not len(documents):
        return {}
    columns = []
    for one in held_out.values():
        at = np.searchsorted(one.document, documents)
        columns.append(one.log_score[at])
    table = np.stack([*columns, counts], axis=1)
    weights = statistics.stacking_weights(table).weight
    return dict(zip((*held_out, CHANCE), (float(weight) for weight in weights), strict=True))


def _common(scored: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of which every model scored the same number of orders (chance counts them), and chance's score there."""
    documents, chance = scored[0]
    kept = np.ones(len(documents), bool)
    for others, other_chance in scored[1:]:
        at = np.searchsorted(others, documents).clip(max=len(others) - 1)
        kept &= (others[at] == documents) & np.isclose(other_chance[at], chance, rtol=1e-12)
    return documents[kept], chance[kept]
