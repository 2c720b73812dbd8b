"""Changes of a model for good."""

from hooked_moe.surgery.pruning import remove_experts

__all__ = ["remove_experts"]
