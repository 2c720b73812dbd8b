"""The design of the factor study: which training choices are varied together, so that each can be told from the others.

arXiv 2606.10703 audits three models that differ in all of these at once; here they vary within one architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from hooked_moe.statistics.factorial import Fraction


@dataclass(frozen=True)
class Factor:
    """A training choice with two levels."""

    name: str
    label: str
    low: str
    high: str


FACTORS = {
    factor.name: factor
    for factor in (
        Factor("F1", "active share k/E", "12.5%", "25%"),
        Factor("F2", "granularity", "k = 2", "k = 8"),
        Factor("F3", "top-k weights renormalised", "no", "yes"),
        Factor("F4", "load-balancing coefficient", ".001", ".02"),
        Factor("F5", "shared expert", "none", "a quarter of the active width"),
        Factor("F6", "start", "from scratch", "upcycled from a dense model at half the steps"),
        Factor("F7", "first layer", "experts", "dense"),
    )
}
DESIGN = Fraction(("F1", "F2", "F3", "F4"), {"F5": ("F1", "F2", "F3"), "F6": ("F2", "F3", "F4"), "F7": ("F1", "F3", "F4")})
"""A 2^(7-3) fraction of resolution IV: 16 runs, main effects clear of interactions of two factors."""
