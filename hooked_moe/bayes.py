"""The rankings compared as models of the order of the active experts: bayes.csv.

Each ranking predicts, at every position and layer, the order of the active experts by what their removal costs (a
Plackett-Luce choice with one coefficient for all layers). They are compared by the Bayes factor of the coefficient against
0, by how well each predicts documents it was not fitted to, and by the weights with which their predictions are best mixed.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe import statistics
from hooked_moe.criteria import CRITERIA
from hooked_moe.effect_grid import EffectGrid
from hooked_moe.rankings import RANKINGS, Scores, family_of
from hooked_moe.statistics import DegenerateSample

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
        self._scores: dict[str, list[np.ndarray]] = {name: [] for name in RANKINGS}

    def update(self, measured: EffectGrid) -> None:
        kept = np.flatnonzero((self._seen + np.arange(len(measured.document))) % self.stride == 0)
        self._seen += len(measured.document)
        some = measured.at_positions(kept)
        axes = [some.layer_axis(layer) for layer in self.scores.layers]
        self._document.append(some.document)
        self._delta.append(some.delta_loss[:, axes])
        by_layer = [dict(self.scores.of(some, layer)) for layer in self.scores.layers]
        for name, parts in self._scores.items():
            columns = [scores[name] for scores in by_layer]
            measured_here = [column for column in columns if column is not None]
            if measured_here:
                parts.append(np.stack(measured_here, axis=1))

    def table(self) -> pa.Table:
        """One row per ranking, and one for chance, the model without any.

        pl_beta: log odds per standard deviation of the score; pl_sd: its error, clustered by document; pl_bf10: Savage-Dickey
        Bayes factor of beta against 0; lodo_score: mean log score of the orders of left-out documents less that of chance, nats
        per order; stacking_weight: of the fixed criteria and chance, mixed document by document. The token scores and the oracle
        are not mixed: they would leave nothing to tell the criteria apart by. `note` says what has no numbers, and why.
        """
        document = np.concatenate(self._document)
        delta = np.concatenate(self._delta)
        n_layers = delta.shape[1]
        scores = {name: np.concatenate(parts) for name, parts in self._scores.items() if parts}
        rows, held_out = [], {}
        for name in RANKINGS:
            fitted: dict[str, object] = {}
            note = self.scores.unmeasured(name)
            if not note:
                defined = np.isfinite(scores[name]).all(axis=(1, 2))
                try:
                    fitted, held_out[name] = _fit(scores[name][defined], delta[defined], document[defined])
                except DegenerateSample as reason:
                    note = str(reason)
            rows.append({"family": family_of(name), "criterion": name, **fitted, "note": note})
        rows.append({"family": CHANCE, "criterion": CHANCE, "lodo_score": 0.0, "note": ""})
        weights = _stacked({name: one for name, one in held_out.items() if name in CRITERIA})
        columns = ("pl_beta", "pl_sd", "pl_bf10", "pl_log_bf10", "lodo_score")
        return pa.Table.from_pylist(
            [
                {
                    "family": row["family"],
                    "criterion": row["criterion"],
                    **{name: float(row.get(name, np.nan)) for name in columns},
                    "stacking_weight": weights.get(row["criterion"], np.nan),
                    "n_positions_used": int(row.get("n_positions", 0)),
                    "n_positions_available": self.n_available,
                    "n_layers": n_layers,
                    "n_orders_tied": int(row.get("n_tied", 0)),
                    "note": row["note"],
                }
                for row in rows
            ]
        )


def _fit(
    score: Float[np.ndarray, "P L K"], delta: Float[np.ndarray, "P L K"], document: np.ndarray
) -> tuple[dict[str, float], statistics.DocumentScores]:
    """One coefficient for all layers, the score standardised in each."""
    if not len(score):
        raise DegenerateSample("undefined at every position")
    n_layers = score.shape[1]
    by_layer = [statistics.standardised(score[:, axis]) for axis in range(n_layers)]
    stacked = np.stack(by_layer, axis=1).reshape(-1, score.shape[2])
    orders, documents = delta.reshape(stacked.shape), np.repeat(document, n_layers)
    fit = statistics.plackett_luce(stacked, orders, documents)
    held_out = statistics.leave_one_document_out(stacked, orders, documents)
    gain = float(np.sum(held_out.log_score - held_out.chance) / fit.n_positions)
    numbers = {"pl_beta": fit.beta, "pl_sd": fit.sd, "pl_bf10": fit.bf10, "pl_log_bf10": fit.log_bf10, "lodo_score": gain}
    return {**numbers, "n_positions": len(score), "n_tied": fit.n_tied}, held_out


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
