"""Circuits with an expert axis: which experts and heads carry a behaviour on given prompts."""

from hooked_moe.circuits.attribution import attribution_patch_experts
from hooked_moe.circuits.circuit import Circuit, circuit
from hooked_moe.circuits.direct_logits import LogitAttribution, direct_logit_attribution
from hooked_moe.circuits.expert_patches import get_act_patch_expert
from hooked_moe.circuits.interactions import PairInteractions, pair_interactions
from hooked_moe.circuits.lens import ExpertLens, ExpertVocabulary, expert_lens, expert_vocabulary
from hooked_moe.circuits.pairs import expert_activations
from hooked_moe.circuits.paths import PathPatches, RouterFlips, path_patch, router_flips
from hooked_moe.circuits.results import ExpertPatches, RouterAttribution, TokenPatches
from hooked_moe.circuits.router_patches import get_act_patch_router, router_attribution
from hooked_moe.circuits.tracing import TracingResult, trace_facts

__all__ = [
    "Circuit",
    "ExpertLens",
    "ExpertPatches",
    "ExpertVocabulary",
    "LogitAttribution",
    "PairInteractions",
    "PathPatches",
    "RouterAttribution",
    "RouterFlips",
    "TokenPatches",
    "TracingResult",
    "attribution_patch_experts",
    "circuit",
    "direct_logit_attribution",
    "expert_activations",
    "expert_lens",
    "expert_vocabulary",
    "get_act_patch_expert",
    "get_act_patch_router",
    "pair_interactions",
    "path_patch",
    "router_attribution",
    "router_flips",
    "trace_facts",
]
