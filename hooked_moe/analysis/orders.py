"""From scores of experts to an order in which to prune them: ranks without ties, in each criterion's published direction."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

UNDEFINED = -1


def pruning_ranks(score: Float[np.ndarray, " expert"], seed: Sequence[int]) -> Int[np.ndarray, " expert"]:
    """0 for the expert with the lowest score, which goes first; UNDEFINED where there is no score.

    Equals are put in an order drawn at random, once for the layer. By slot, as an argmin would have it, they would be ordered
    by their routing weight, and a criterion that says nothing would seem to know something. Against strict orders drawn at
    random, a strict order is tested exactly, however many ties its scores have.
    """
    drawn = np.random.default_rng([*seed, len(score)]).permutation(len(score))
    order = np.lexsort((drawn, score))  # NaN last
    ranks = np.empty(len(score), np.int64)
    ranks[order] = np.arange(len(score))
    return np.where(np.isnan(score), UNDEFINED, ranks)


def random_orders(n_orders: int, n_experts: int, seed: Sequence[int]) -> Int[np.ndarray, "order expert"]:
    """Ranks of the experts in orders drawn at random: what scores dealt to the experts by chance amount to."""
    random = np.random.default_rng([*seed, n_experts])
    return random.permuted(np.tile(np.arange(n_experts), (n_orders, 1)), axis=1)


def oriented(values: Mapping[int, Float[np.ndarray, " expert"]], highest_first: bool) -> dict[int, Float[np.ndarray, " expert"]]:
    """Scores by layer, turned so that the lowest goes first."""
    return {layer: -score if highest_first else score for layer, score in values.items()}
