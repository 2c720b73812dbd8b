"""Attribution patching of experts: the first-order estimate of every patch, from gradients of the corrupted run.

    attribution_patch_experts(model, clean_tokens, corrupted_tokens, At(-1, LogitDifference(answer, foil)))

To first order a patch moves the metric by delta . d metric / d (routed output), at the cost of two forwards and a backward for
all experts of all tokens (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). Integrated gradients ("ig"; Sundararajan et al. 2017,
arXiv 1703.01365) take the slope's mean along a layer's way from its corrupted to its clean routed output instead. Hanna et al.
(2024, arXiv 2403.17806) move the embeddings, and with them all layers at once: on tiny-olmoe that is further from exact patches
than the plain gradient is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.atp_star import atp_star, with_pattern_terms
from hooked_moe.circuits.expert_patches import aligned, as_patches, asked_positions, with_slot_per_expert
from hooked_moe.circuits.gradients import Gradients, along, direct_gradients, residual_gradients
from hooked_moe.circuits.metrics import Metric, check_metric, differentiable_value, require_slope
from hooked_moe.circuits.pairs import Clean, Part, PromptPair, check_part, expert_deltas, prompt_pair
from hooked_moe.circuits.results import ExpertPatches
from hooked_moe.circuits.route_fix import rerouting_terms
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals import At
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens, checked_layers
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

Method = Literal["atp", "ig", "routefix", "qkfix", "atp*", "direct"]


@torch.inference_mode(False)
@without_autocast()
def attribution_patch_experts(
    model: Transformer,
    clean: Clean,
    corrupt: Tokens,
    metric: Metric,
    method: Method = "atp",
    steps: int = 5,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    part: Part = "contribution",
    attention_mask: Mask | None = None,
    *,
    dense: bool = False,
    progress: bool = False,
) -> ExpertPatches:
    """Estimate what `get_act_patch_expert` measures, with the same arguments and results.

    `method` "atp" takes the gradient of the corrupted run; "ig" its mean over `steps` runs whose routed outputs of the layer are
    on the way from the corrupted to the clean run's, where asked for; "routefix" is "atp" with the routing of later layers at the
    patched token computed exactly, from the patch's direct path, and "qkfix" with their attention patterns instead; "atp*" is the
    mean size of "qkfix" without each other layer in turn, an importance that is never negative; "direct" is direct logit
    attribution of the patch, what it adds to the logits by itself, the final norm's scale held fixed (for a readout only).
    `metric` is a function of the logits or
    `At(position, LogitDifference(...))`. Raises `ValueError` as `get_act_patch_expert` does, for other readouts, and for a model
    whose weights are streamed.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, not {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be a whole number from 1, not {steps!r}")
    check_part(part)
    model.require_weights("a gradient")
    chosen = checked_layers(model, layers)
    pair = prompt_pair(model, clean, corrupt, attention_mask)
    check_metric(metric, pair)
    require_slope(metric)
    if method == "direct" and not isinstance(metric, At):
        raise ValueError(f"method='direct' takes At(position, LogitDifference(...)), not {metric!r}")
    asked = asked_positions(pair, positions)
    by_layer = aligned({layer: expert_deltas(pair, layer, part).where(asked) for layer in chosen})
    gradients: Gradients = {}
    if method == "direct":
        gradients = dict.fromkeys(chosen, direct_gradients(pair, metric))
    elif method in ("atp", "routefix"):
        gradients = residual_gradients(pair, metric)
    elif method == "ig":
        moved = {layer: deltas.delta.sum(2) for layer, deltas in by_layer.items()}
        with progress_bar(len(moved) * steps, "gradients", "run", shown=progress) as bar:
            gradients = {layer: _mean_gradient(pair, metric, layer, change, steps, bar) for layer, change in moved.items()}
    with torch.no_grad():
        if method in ("qkfix", "atp*"):
            estimates = (atp_star if method == "atp*" else with_pattern_terms)(pair, metric, by_layer)
        else:
            estimates = {layer: along(deltas.delta, gradients[layer]) for layer, deltas in by_layer.items()}
        if method == "routefix":
            terms = rerouting_terms(pair, by_layer, gradients)
            estimates = {layer: values + terms[layer] for layer, values in estimates.items()}
        values = torch.stack(list(estimates.values()))
        active = {layer: deltas.active() for layer, deltas in by_layer.items()}
        patches = as_patches(pair, active, values, metric, part, method)
    return with_slot_per_expert(patches) if dense else patches


def _mean_gradient(
    pair: PromptPair, metric: Any, layer: int, change: Float[Tensor, "batch pos d_model"], steps: int, bar: Any
) -> Float[Tensor, "batch pos d_model"]:
    """The gradient's mean at the midpoints of equal steps along a change of the residual stream after a block."""
    total = torch.zeros_like(change)
    for step in range(steps):
        resid = (pair.resid_post("corrupt", layer) + (step + 0.5) / steps * change).requires_grad_()
        with torch.enable_grad():
            final = pair.model(
                resid,
                start_at_layer=layer + 1,
                stop_at_layer=pair.model.cfg.n_layers,
                attention_mask=pair.attention_mask,
            )
            (gradient,) = torch.autograd.grad(differentiable_value(pair, metric, final), resid)
        total += gradient
        bar.update()
    return total / steps
