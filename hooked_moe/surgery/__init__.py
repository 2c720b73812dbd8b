"""Permanent changes of a model."""

from hooked_moe.surgery.alignment import align_experts, match_experts, renumber_experts
from hooked_moe.surgery.checkpoint_grafts import CheckpointGrafts, graft_checkpoints
from hooked_moe.surgery.graft_sweeps import DocumentValues, coalition_shares, graft_sweep, null_sweep
from hooked_moe.surgery.grafting import Grafts, graft, untrained
from hooked_moe.surgery.parts import PARTS
from hooked_moe.surgery.pruning import remove_experts, without_experts
from hooked_moe.surgery.upcycling import upcycle

__all__ = [
    "PARTS",
    "CheckpointGrafts",
    "DocumentValues",
    "Grafts",
    "align_experts",
    "coalition_shares",
    "graft",
    "graft_checkpoints",
    "graft_sweep",
    "match_experts",
    "null_sweep",
    "remove_experts",
    "renumber_experts",
    "untrained",
    "upcycle",
    "without_experts",
]
