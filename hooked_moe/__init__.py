"""Mixture-of-experts language models with a hook point at every step, for causal experiments on experts at single tokens."""

from hooked_moe.activation_cache import ActivationCache
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.hook_points import HookPoint
from hooked_moe.model import HookedMoE

__version__ = "0.1.0"
__all__ = ["ActivationCache", "ExpertMask", "HookPoint", "HookedMoE", "HookedMoEConfig"]
