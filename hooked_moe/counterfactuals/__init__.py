"""Exact counterfactuals: what every expert does, asked of a model one change at a time and all changes at once."""

from hooked_moe.counterfactuals.expert_removal import Scope, expert_effects
from hooked_moe.counterfactuals.expert_sets import mask_effects
from hooked_moe.counterfactuals.first_order import FirstOrderEffects, first_order_effects
from hooked_moe.counterfactuals.later_readouts import After, At
from hooked_moe.counterfactuals.means import expert_means
from hooked_moe.counterfactuals.observations import expert_observations
from hooked_moe.counterfactuals.progressive_removal import Order, progressive_effects
from hooked_moe.counterfactuals.readouts import KL, Displacement, LogitDifference, Loss, LossAfter
from hooked_moe.counterfactuals.removals import Mean, Removal, Renormalize, Reroute, Zero
from hooked_moe.counterfactuals.results import ExpertEffects, VariantEffects
from hooked_moe.counterfactuals.token_edits import Queries, VariantQueries, token_effects

__all__ = [
    "KL",
    "After",
    "At",
    "Displacement",
    "ExpertEffects",
    "FirstOrderEffects",
    "LogitDifference",
    "Loss",
    "LossAfter",
    "Mean",
    "Order",
    "Queries",
    "Removal",
    "Renormalize",
    "Reroute",
    "Scope",
    "VariantEffects",
    "VariantQueries",
    "Zero",
    "expert_effects",
    "expert_means",
    "expert_observations",
    "first_order_effects",
    "mask_effects",
    "progressive_effects",
    "token_effects",
]
