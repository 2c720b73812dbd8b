"""Permanent changes of a model."""

from hooked_moe.surgery.pruning import remove_experts, without_experts

__all__ = ["remove_experts", "without_experts"]
