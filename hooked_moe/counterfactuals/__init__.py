"""Exact counterfactuals: what every expert does, asked of a model one change at a time and all changes at once."""

from hooked_moe.counterfactuals.first_order import first_order_effects
from hooked_moe.counterfactuals.questions import (
    Order,
    Scope,
    Where,
    expert_effects,
    expert_observations,
    mask_effects,
    progressive_effects,
    token_effects,
)
from hooked_moe.counterfactuals.readouts import KL, Displacement, LogitDifference, LossAfter
from hooked_moe.counterfactuals.removals import ExpertMeans, expert_means
from hooked_moe.counterfactuals.results import ExpertEffects, VariantEffects

__all__ = [
    "KL",
    "Displacement",
    "ExpertEffects",
    "ExpertMeans",
    "LogitDifference",
    "LossAfter",
    "Order",
    "Scope",
    "VariantEffects",
    "Where",
    "expert_effects",
    "expert_means",
    "expert_observations",
    "first_order_effects",
    "mask_effects",
    "progressive_effects",
    "token_effects",
]
