"""Fractional factorial designs, against the columns that they are made of."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from hooked_moe.analysis.factors import DESIGN
from hooked_moe.statistics.factorial import Fraction, Word, informative_order


def test_the_factor_study_is_an_orthogonal_array_of_resolution_four() -> None:
    levels = DESIGN.levels()
    assert levels.shape == (16, 7)
    assert len({tuple(row) for row in levels[:, :4]}) == 16
    assert np.array_equal(levels.T @ levels, 16 * np.eye(7))
    assert (levels.sum(axis=0) == 0).all()
    assert DESIGN.resolution == 4


@pytest.mark.parametrize(
    "fraction",
    [
        DESIGN,
        Fraction(("A", "B"), {"C": ("A", "B")}),
        Fraction(("A", "B", "C"), {"D": ("A", "B"), "E": ("A", "C")}),
        Fraction(("A", "B", "C", "D"), {"E": ("A", "B", "C", "D")}),
        Fraction(("A", "B", "C"), {}),
    ],
    ids=["study", "half", "quarter", "resolution V", "full"],
)
def test_aliases_are_the_effects_whose_columns_are_equal(fraction: Fraction) -> None:
    effects = [Word(names) for size in (1, 2) for names in combinations(fraction.factors, size)]
    for effect in effects:
        equal = {
            other for other in effects if other != effect and np.array_equal(fraction.column(effect), fraction.column(other))
        }
        assert set(fraction.aliases(effect)) == equal
    sets = fraction.alias_sets()
    assert sorted(effect for own in sets for effect in map(sorted, own)) == sorted(map(sorted, effects))
    assert all(np.array_equal(fraction.column(own[0]), fraction.column(other)) for own in sets for other in own)


def test_defining_words_are_the_products_that_never_change() -> None:
    products = [Word(names) for size in range(1, 8) for names in combinations(DESIGN.factors, size)]
    constant = {word for word in products if (DESIGN.column(word) == 1).all()}
    assert DESIGN.defining_words() == constant
    assert len(constant) == 7


def test_the_first_half_of_the_order_tells_all_main_effects_apart() -> None:
    levels = DESIGN.levels()
    order = informative_order(levels)
    assert sorted(order) == list(range(16))
    half = np.column_stack([np.ones(8), levels[order[:8]]])
    assert np.array_equal(half.T @ half, 8 * np.eye(8))
    for n in range(4, 17, 4):
        assert np.abs(levels[order[:n]].sum(axis=0)).max() <= 4


def test_generators_must_be_products_of_basic_factors() -> None:
    with pytest.raises(ValueError, match=r"generator C = A\*D"):
        Fraction(("A", "B"), {"C": ("A", "D")})
    with pytest.raises(ValueError, match="must be among"):
        DESIGN.aliases(Word(["F9"]))
