"""Two-level fractional factorial designs: their runs, what they confound, and an order in which to make the runs.

Box, Hunter & Hunter (2005), *Statistics for Experimenters*, chapter 6. A factor is at -1 (low) or +1 (high).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Word = frozenset[str]
"""A set of factors: one is a main effect, two an interaction of two, and so on."""


@dataclass(frozen=True)
class Fraction:
    """A 2^(k-p) fraction: all combinations of the basic factors, and p factors whose levels are products of theirs.

    `generators` maps each of the p others to the basic factors whose product it is:

    >>> half = Fraction(("A", "B"), {"C": ("A", "B")})
    >>> half.levels().tolist()
    [[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]
    """

    basic: tuple[str, ...]
    generators: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        for factor, product in self.generators.items():
            if factor in self.basic or not product or not set(product) <= set(self.basic):
                raise ValueError(f"generator {factor} = {'*'.join(product)}: a new factor must be a product of {self.basic}")

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.basic, *self.generators)

    def levels(self) -> Float[np.ndarray, "run factor"]:
        """-1 or +1 of every factor in every run, in standard order: the first factor changes fastest."""
        rows = np.array(list(itertools.product((-1.0, 1.0), repeat=len(self.basic))))[:, ::-1]
        column = dict(zip(self.basic, rows.T, strict=True))
        products = [np.prod([column[name] for name in product], axis=0) for product in self.generators.values()]
        return np.column_stack([*rows.T, *products])

    def defining_words(self) -> set[Word]:
        """The products of factors that are +1 in every run: those of the generators, and all products of these."""
        own = [Word({factor, *product}) for factor, product in self.generators.items()]
        chosen = (words for n in range(1, len(own) + 1) for words in itertools.combinations(own, n))
        return {_product(words) for words in chosen}

    @property
    def resolution(self) -> int:
        """Length of the shortest defining word: at 4, main effects are clear of interactions of two factors."""
        return min(map(len, self.defining_words()))

    def aliases(self, effect: Word, order: int = 2) -> list[Word]:
        """The effects of at most `order` factors that this fraction cannot tell from `effect`, each in the factors' order."""
        unknown = effect - set(self.factors)
        if unknown or not effect:
            raise ValueError(f"effect {sorted(effect)}: its factors must be among {self.factors}")
        equal = (effect ^ word for word in self.defining_words())
        return sorted((other for other in equal if 0 < len(other) <= order), key=self.name_of)

    def alias_sets(self, order: int = 2) -> list[list[Word]]:
        """All effects of at most `order` factors, in sets that share one column of the design; main effects come first."""
        sets: list[list[Word]] = []
        seen: set[Word] = set()
        for size in range(1, order + 1):
            for names in itertools.combinations(self.factors, size):
                effect = Word(names)
                if effect not in seen:
                    sets.append([effect, *self.aliases(effect, order)])
                    seen.update(sets[-1])
        return sets

    def column(self, effect: Word) -> Float[np.ndarray, " run"]:
        """The contrast of an effect: the product of its factors' levels."""
        levels = self.levels()
        return np.prod([levels[:, self.factors.index(name)] for name in effect], axis=0)

    def name_of(self, effect: Word) -> str:
        """As in "F1 x F2"."""
        return " x ".join(sorted(effect, key=self.factors.index))


def informative_order(levels: Float[np.ndarray, "run factor"], ridge: float = 1e-3) -> list[int]:
    """The runs in an order whose every beginning tells as much as it can: each next run is the one that most raises
    det(X'X + ridge), X the main effects and the mean of the runs so far (greedy D-optimality; the first of equals)."""
    X = np.column_stack([np.ones(len(levels)), levels])
    information = ridge * np.eye(X.shape[1])
    order: list[int] = []
    while len(order) < len(X):
        rest = [run for run in range(len(X)) if run not in order]
        gain = [round(float(X[run] @ np.linalg.solve(information, X[run])), 9) for run in rest]
        order.append(rest[int(np.argmax(gain))])
        information += np.outer(X[order[-1]], X[order[-1]])
    return order


def _product(words: Sequence[Word]) -> Word:
    """A factor times itself is one, so that it drops out."""
    result = Word()
    for word in words:
        result ^= word
    return result
