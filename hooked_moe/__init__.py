"""Mixture-of-experts language models with a hook point at every step, for causal experiments on experts at single tokens.

Names are imported when they are first used, so that `import hooked_moe.report`, which reads tables and needs no model, does not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hooked_moe.version import __version__

if TYPE_CHECKING:
    from hooked_moe.cli.audit import Audit, audit
    from hooked_moe.components.key_value_cache import KeyValueCache
    from hooked_moe.config import HookedMoEConfig
    from hooked_moe.corpus import load_corpus
    from hooked_moe.counterfactuals import expert_effects
    from hooked_moe.expert_mask import ExpertMask
    from hooked_moe.hooks.activation_cache import ActivationCache
    from hooked_moe.hooks.hook_point import HookPoint
    from hooked_moe.model import HookedMoE
    from hooked_moe.tokenizer import Tokenizer

_HOMES = {
    "Audit": "hooked_moe.cli.audit",
    "ActivationCache": "hooked_moe.hooks.activation_cache",
    "ExpertMask": "hooked_moe.expert_mask",
    "HookPoint": "hooked_moe.hooks.hook_point",
    "HookedMoE": "hooked_moe.model",
    "HookedMoEConfig": "hooked_moe.config",
    "KeyValueCache": "hooked_moe.components.key_value_cache",
    "Tokenizer": "hooked_moe.tokenizer",
    "audit": "hooked_moe.cli.audit",
    "expert_effects": "hooked_moe.counterfactuals",
    "load_corpus": "hooked_moe.corpus",
}
_ROOMS = (
    "analysis",
    "circuits",
    "corpus",
    "counterfactuals",
    "loading",
    "measurement",
    "report",
    "routing",
    "statistics",
    "surgery",
    "tables",
)

__all__ = [
    "ActivationCache",
    "Audit",
    "ExpertMask",
    "HookPoint",
    "HookedMoE",
    "HookedMoEConfig",
    "KeyValueCache",
    "Tokenizer",
    "__version__",
    "audit",
    "expert_effects",
    "load_corpus",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return import_module(f"hooked_moe.{name}")
    raise AttributeError(f"module 'hooked_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
