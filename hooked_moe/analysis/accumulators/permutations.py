"""The saving of orders drawn at random: what a criterion would save if its scores were dealt to the experts by chance.

A strict order whose scores are dealt at random is a uniformly random order, whatever the criterion was. So one set of random
orders in each layer serves all criteria and both effects, exactly. Only the positions that a criterion leaves out, for an active
expert without a score, make a difference: they are left out of its random orders too.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from hooked_moe.analysis.accumulators.documents import Documents
from hooked_moe.analysis.orders import random_orders

N_ORDERS = 1999
"""p is two-sided, and 0.001 at the least: after Holm's correction over 25 criteria still below 0.05."""
MAXIMUM_POSITIONS = 40_000
"""Of a longer corpus every n-th document is taken, for the criteria as for the random orders, so that time stays bounded."""
_ORDERS_PER_CHUNK, _POSITIONS_PER_CHUNK = 256, 512


class RandomOrders:
    """Savings of `N_ORDERS` random orders in every layer, summed over positions."""

    def __init__(
        self,
        documents: Documents,
        undefined: Bool[np.ndarray, "pattern layer expert"],
        n_slots: int,
        n_measured: int,
        effects: tuple[str, ...],
        seed: int = 0,
        n_orders: int = N_ORDERS,
    ) -> None:
        """`undefined` has one row for each set of experts without a score that a criterion has."""
        self.undefined, self.n_slots = undefined, n_slots
        n_patterns, n_layers, n_experts = undefined.shape
        self.chosen = np.arange(len(documents)) % max(1, -(-n_measured // MAXIMUM_POSITIONS)) == 0
        self._chosen_ids = documents.ids[self.chosen]
        self._orders = [random_orders(n_orders, n_experts, (seed, axis)) for axis in range(n_layers)]
        self.effects = effects
        self._savings = np.zeros((len(effects), n_patterns, n_layers, n_orders))

    def update(
        self,
        axis: int,
        document: Int[np.ndarray, " position"],
        expert: Int[np.ndarray, "slot position"],
        effects: dict[str, Float[np.ndarray, "slot position"]],
    ) -> None:
        """Add a chunk's measured positions in the layer with this number."""
        here = np.flatnonzero(np.isin(document, self._chosen_ids))
        experts = np.ascontiguousarray(expert[:, here]).astype(np.intp)
        # in float64 from here on: to widen the numbers of each order as they are summed takes longer
        tables = [effects[name][:, here] for name in self.effects]
        spared = np.stack([(table.mean(axis=0, dtype=np.float64) - table).T for table in tables], axis=-1)
        for start in range(0, len(here), _POSITIONS_PER_CHUNK):
            rows = slice(start, start + _POSITIONS_PER_CHUNK)
            self._add(axis, np.ascontiguousarray(experts[:, rows]), spared[rows])

    def _add(
        self, axis: int, expert: Int[np.ndarray, "slot position"], spared: Float[np.ndarray, "position slot effect"]
    ) -> None:
        """The active expert removed first is that of the lowest rank; the low bits of a key say in which slot it is.

        `spared` is what the removal of each costs less than that of one at random.
        """
        orders, bits = self._orders[axis], (self.n_slots - 1).bit_length()
        left_out = [undefined[axis][expert].any(axis=0) for undefined in self.undefined]
        kind = np.dtype(np.int16 if orders.shape[1] << bits < 2**15 else np.int32)
        first_slot = np.arange(len(spared))[:, None] * self.n_slots
        by_slot = spared.reshape(-1, spared.shape[-1])
        for start in range(0, len(orders), _ORDERS_PER_CHUNK):
            chunk = slice(start, start + _ORDERS_PER_CHUNK)
            keys = np.ascontiguousarray(orders[chunk].T << bits).astype(kind)  # [expert, order]; the slot is added
            lowest = _rows(keys, expert[0])
            key = np.empty_like(lowest)
            for slot, column in enumerate(expert[1:], start=1):
                np.minimum(lowest, _rows(keys + kind.type(slot), column, out=key), out=lowest)
            saved = _rows(by_slot, first_slot + (lowest & kind.type((1 << bits) - 1)))  # all effects of a removal at once
            total = saved.sum(axis=0)
            for pattern, mask in enumerate(left_out):
                lost = saved[mask].sum(axis=0) if mask.any() else 0.0
                self._savings[:, pattern, axis, chunk] += (total - lost).T

    def savings(self, effect: str, patterns: Int[np.ndarray, " layer"]) -> Float[np.ndarray, "layer order"]:
        """Of a criterion with these patterns, one for each layer, in nats, summed over the positions of the chosen documents."""
        return self._savings[self.effects.index(effect), patterns, np.arange(len(patterns))]


def _rows(
    table: Num[np.ndarray, "row column"], number: Int[np.ndarray, "*shape"], out: Num[np.ndarray, "*shape column"] | None = None
) -> Num[np.ndarray, "*shape column"]:
    """`table[number]`, whose bounds are known to be kept: numpy is twice as fast where it need not look for itself."""
    return table.take(number, axis=0, mode="clip", out=out)
