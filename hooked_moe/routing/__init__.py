"""Where tokens go: routing tables and what they say, the tokens of every expert, and sending tokens elsewhere."""

from hooked_moe.routing.agreement import RoutingAgreement, routing_agreement
from hooked_moe.routing.expert_detection import ExpertContrast, detect_experts
from hooked_moe.routing.expert_pairs import Coactivation, Transition, coactivation, transition
from hooked_moe.routing.ranked_tokens import TopTokens, top_tokens
from hooked_moe.routing.replay import (
    Condition,
    Routes,
    RoutingAgainstContent,
    record_routes,
    replay_routes,
    routing_against_content,
)
from hooked_moe.routing.route_table import ROUTES, RoutingTable, routing_table
from hooked_moe.routing.specialisation import (
    DomainSpecialisation,
    StandingCommittee,
    VocabularySpecialisation,
    domain_specialisation,
    standing_committee,
    vocabulary_specialisation,
)
from hooked_moe.routing.steering import steer_routes

__all__ = [
    "ROUTES",
    "Coactivation",
    "Condition",
    "DomainSpecialisation",
    "ExpertContrast",
    "Routes",
    "RoutingAgainstContent",
    "RoutingAgreement",
    "RoutingTable",
    "StandingCommittee",
    "TopTokens",
    "Transition",
    "VocabularySpecialisation",
    "coactivation",
    "detect_experts",
    "domain_specialisation",
    "record_routes",
    "replay_routes",
    "routing_against_content",
    "routing_agreement",
    "routing_table",
    "standing_committee",
    "steer_routes",
    "top_tokens",
    "transition",
    "vocabulary_specialisation",
]
