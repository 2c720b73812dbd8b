"""What the effect of nothing is: rounding, in the very products that effects are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.fan_out import fan_out
from hooked_moe.counterfactuals.engine.lanes import Lanes
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn, pausable
from hooked_moe.counterfactuals.removals import Zero
from hooked_moe.transformer import Transformer


@pausable
def noise_floor(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> Steps[float]:
    """Largest "effect", in nats, of removing nothing: through the counterfactuals of every layer, in a batch, against the
    baseline of each sequence alone.

    Effects below it are rounding. Zero is possible: the same operations in the same order.
    """

    def nothing_removed(clean: CleanBlock) -> Float[Tensor, "1 batch pos d_model"]:
        experts = as_expert_block(clean)
        return Zero().without(experts, torch.ones_like(experts.routing.weights, dtype=torch.bool)[None])

    packed = pack(tokens.to(model.cfg.device), None)
    runs = [(packed, model.cfg.moe_layers), *((row, []) for row in packed.split(1))]
    together, *alone = yield from in_turn(
        [fan_out(model, part, Lanes.of_variants(layers, 1), nothing_removed) for part, layers in runs], model.streams
    )
    return float((together.losses - torch.cat([one.baseline for one in alone]))[..., :-1].abs().max())
