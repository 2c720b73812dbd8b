"""What following a ranking saves: savings.csv, the answer to "is this criterion any good?" in nats.

At a position, removing one of the active experts at random costs what it costs on average; removing the one that a ranking prunes
first costs less, if the ranking knows something. The difference is the *saving*: what a user of the criterion gains, in nats
and as a share of the random cost. It is a mean, so it does not drown in the luck of single tokens, as d over positions does;
and it is judged twice: by an interval from resampling documents (would other texts say the same?) and by a permutation over
experts (would other scores have done as well?). `statistics.saving_outcome` puts both together.

Two effects are asked about: `delta_loss`, of the token that followed, and `kl`, expected over next tokens drawn from the model.
Rankings are followed in their published direction; where none is published, the lowest goes first, and "harms" then says that the
other direction would help. An active expert without a score (std of one token) has no rank, and its positions are left out of
that ranking, random cost included; equals are put in an order drawn once per layer (`orders.pruning_ranks`).
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums, effect_columns
from hooked_moe.analysis.accumulators.permutations import RandomOrders
from hooked_moe.analysis.accumulators.savings import Ranking, SavingAccumulator
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.oracle import fold_of, oracle_scores
from hooked_moe.analysis.orders import UNDEFINED, pruning_ranks
from hooked_moe.analysis.rankings import ORACLE, TOKEN_LADDER, Scores
from hooked_moe.tables.effect_grid import EffectGrid

EXACT_KL = "kl"
"""The exact expected effect as a ranking of the realised one: what no criterion can surpass, knowing all but the token drawn."""


def saving_rankings() -> tuple[str, ...]:
    """Criteria, per-token scores, and the oracle, in the order of savings.csv."""
    return (*CRITERIA, *TOKEN_LADDER, EXACT_KL, ORACLE)


class SavingAudit:
    """The second pass: every ranking in every layer, for each effect, over chunks of measured positions."""

    def __init__(
        self, scores: Scores, sums: ExpertEffectSums, documents: Documents, n_slots: int, n_measured: int, seed: int = 0
    ) -> None:
        """`scores` are of the layers asked for, `sums` of all that were measured, over all documents."""
        self.scores, self.documents, self.effects = scores, documents, sums.effects
        self.layers, self.rankings = scores.layers, saving_rankings()
        axes = [sums.layers.index(layer) for layer in self.layers]
        self._active: Bool[np.ndarray, "layer expert"] = sums.counts()[:, axes].sum(axis=0) > 0
        n_experts = self._active.shape[1]
        kind = np.int16 if n_experts * n_slots < 2**15 else np.int32
        self.constant: set[tuple[str, int]] = set()  # (criterion, layer axis) that ranks nothing
        self._ranks = {name: self._ranked(name, seed).astype(kind) for name in CRITERIA if not scores.unmeasured(name)}
        self._oracles = {
            effect: np.stack([[pruning_ranks(s, (seed, axis)) for s in folds] for axis, folds in enumerate(oracle)]).astype(kind)
            for effect, oracle in ((effect, oracle_scores(sums, effect)[axes]) for effect in self.effects)
        }
        undefined, self.patterns = self._undefined()
        self.savings = SavingAccumulator(documents, len(self.layers), len(self.rankings), n_slots, self.effects)
        self.orders = RandomOrders(documents, undefined, n_slots, n_measured, self.effects, seed)
        self.absent: set[str] = set()  # per-token scores that the effect table lacks

    def _ranked(self, name: str, seed: int) -> Int[np.ndarray, "layer expert"]:
        """Ranks of the experts; UNDEFINED throughout a layer whose active experts the criterion does not tell apart."""
        ranks = np.full(self._active.shape, UNDEFINED, np.int64)
        for axis, layer in enumerate(self.layers):
            score = self.scores.by_expert(name, layer)
            known = score[self._active[axis] & ~np.isnan(score)]
            if len(known) and np.ptp(known) > 0:
                ranks[axis] = pruning_ranks(score, (seed, axis))
            else:
                self.constant.add((name, axis))
        return ranks

    def _undefined(self) -> tuple[Bool[np.ndarray, "pattern layer expert"], dict[str, Int[np.ndarray, " layer"]]]:
        """The sets of active experts without a rank that occur in a layer, and which of them each criterion has."""
        patterns: list[list[np.ndarray]] = [[np.zeros(self._active.shape[1], bool)] for _ in self.layers]
        found = {name: np.zeros(len(self.layers), np.int64) for name in (*CRITERIA, ORACLE)}
        for name, ranks in self._ranks.items():
            for axis, known in enumerate(patterns):
                if (name, axis) in self.constant:
                    continue
                pattern = (ranks[axis] == UNDEFINED) & self._active[axis]
                number = next((i for i, other in enumerate(known) if np.array_equal(pattern, other)), len(known))
                if number == len(known):
                    known.append(pattern)
                found[name][axis] = number
        size = max(map(len, patterns))
        padded = [known + [known[0]] * (size - len(known)) for known in patterns]
        return np.swapaxes(np.array(padded), 0, 1), found

    def update(self, measured: EffectGrid) -> None:
        """Add a chunk's measured positions."""
        for add in self.updates(measured):
            add()

    def updates(self, measured: EffectGrid) -> tuple[Callable[[], None], Callable[[], None]]:
        """The two halves of `update`, which may be done side by side."""

        def follow_rankings() -> None:
            for axis, at, expert, effects in self._by_layer(measured):
                self.savings.update(axis, measured.document, effects, self.rankings_at(measured, axis, at, expert))

        def follow_random_orders() -> None:
            for axis, _, expert, effects in self._by_layer(measured):
                self.orders.update(axis, measured.document, expert, effects)

        return follow_random_orders, follow_rankings

    def _by_layer(
        self, measured: EffectGrid
    ) -> Iterator[tuple[int, int, Int[np.ndarray, "slot position"], dict[str, Float[np.ndarray, "slot position"]]]]:
        """Number of each layer, its number among the measured ones, and a chunk's experts and effects there."""
        columns = effect_columns(measured)
        for axis, layer in enumerate(self.layers):
            at = measured.layer_axis(layer)
            effects = {name: np.ascontiguousarray(columns[name][:, at].T) for name in self.effects}
            yield axis, at, np.ascontiguousarray(measured.expert[:, at].T), effects

    def rankings_at(
        self, measured: EffectGrid, axis: int, at: int, expert: Int[np.ndarray, "slot position"]
    ) -> Iterator[Ranking]:
        """Every ranking in the layer of this number, which is number `at` of the measured ones."""
        number = {name: i for i, name in enumerate(self.rankings)}
        for name, ranks in self._ranks.items():
            if (name, axis) not in self.constant:
                yield Ranking(number[name], ranks[axis][expert], self.effects)
        for name in (*TOKEN_LADDER, EXACT_KL):
            values = getattr(measured, name)
            if values is None:
                self.absent.add(name)
                continue
            asked = tuple(effect for effect in self.effects if effect != name)
            yield Ranking(number[name], np.ascontiguousarray(values[:, at].T), asked)
        fold = fold_of(measured.document)
        for effect, ranks in self._oracles.items():
            yield Ranking(number[ORACLE], ranks[axis][fold[None, :], expert], (effect,))
