"""Permanent changes of a model."""

from hooked_moe.surgery.pruning import remove_experts, without_experts
from hooked_moe.surgery.upcycling import upcycle

__all__ = ["remove_experts", "upcycle", "without_experts"]
