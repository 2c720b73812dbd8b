"""How a model routes."""

from __future__ import annotations

from hooked_moe.components.moe import MoE
from hooked_moe.kernels.routing import RoutingRule
from hooked_moe.transformer import Transformer


def rule_of(model: Transformer) -> RoutingRule:
    """The routing rule, which is the same in all layers: of a streamed model, one block is read for it."""
    moe = model.blocks[model.cfg.moe_layers[0]].mlp
    assert isinstance(moe, MoE)
    return moe.router.rule
