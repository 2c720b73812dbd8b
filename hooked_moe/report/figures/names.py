"""How rankings of experts are named and drawn, alike in every figure and table."""

from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.report.figures.drawing import BLACK, BLUE, GREEN, PURPLE, SKY, VERMILLION

FIXED_FAMILIES = ("paper", "extended")
"""Families of rankings that are fixed for the corpus, which one can prune by."""

FAMILY_TITLES = {
    "paper": "criteria of the paper",
    "extended": "further criteria",
    "token": "per-token scores",
    "oracle": "oracle",
    "chance": "no ranking",
}

# Colour and marker of the rankings that are not fixed criteria, and the greys of the paper's four.
SCORE_LINES = {
    "routing_weight": (VERMILLION, "o"),
    "gap_norm": (BLUE, "s"),
    "first_order": (GREEN, "^"),
    "first_order_curved": (SKY, "<"),
    "kl": (PURPLE, "v"),
    "oracle": (BLACK, "D"),
}
PAPER_LINES = (("#303030", "o"), ("#606060", "s"), ("#808080", "^"), ("#9a9a9a", "D"))

_LABELS = {
    "routing_weight": "routing weight",
    "gap_norm": "gap norm",
    "first_order": "first order (told the token)",
    "first_order_curved": "first order, curved (told the token)",
    "kl": "exact expected effect (KL)",
    "oracle": "oracle",
    "mean_effect": "mean effect in other documents",
    "sum_effect": "sum of effects in other documents",
    "table": "shrunk sum of expected effects",
}


def label(ranking: str) -> str:
    """A ranking's name for people, short enough for an axis."""
    return CRITERIA[ranking].label if ranking in CRITERIA else _LABELS.get(ranking, ranking.replace("_", " "))
