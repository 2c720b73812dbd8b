"""How rankings of experts are named and drawn, alike in every figure and table."""

from hooked_moe.figures.drawing import BLACK, BLUE, GREEN, VERMILLION

FAMILY_TITLES = {
    "paper": "criteria of the paper",
    "extended": "further criteria",
    "token": "scores of the very token",
    "oracle": "oracle",
}

# Colour and marker of what is no fixed criterion, and the greys of the paper's four.
SCORE_LINES = {
    "routing_weight": (VERMILLION, "o"),
    "gap_norm": (BLUE, "s"),
    "first_order": (GREEN, "^"),
    "oracle": (BLACK, "D"),
}
PAPER_LINES = (("#303030", "o"), ("#606060", "s"), ("#808080", "^"), ("#9a9a9a", "D"))

_LABELS = {
    "routing_weight": "routing weight g",
    "gap_norm": "gap norm g‖E‖",
    "first_order": "first-order estimate",
    "oracle": "oracle (held-out mean effect)",
    "activation_norm": "activation norm",
    "activation_std": "activation std",
    "mean_routing_weight_when_active": "mean routing weight when active",
    "ean_sum": "EAN sum",
    "weighted_ean": "weighted EAN",
    "reap": "REAP",
    "aimer": "AIMER",
    "coactivation": "co-activation",
    "router_row_norm": "router-row norm",
    "expert_weight_norm": "expert-weight norm",
}


def label(ranking: str) -> str:
    """A ranking's name for people."""
    return _LABELS.get(ranking, ranking.replace("_", " "))
