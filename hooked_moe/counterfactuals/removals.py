"""What it means to leave experts out of a block: the residual stream after it, with other routing weights.

keep = each_slot_removed(clean)              # variant j leaves out the expert of slot j
resid = without(clean, keep, "zero")         # [variant, batch, pos, d_model]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooked_moe.components.moe import add_shared, combine_onto
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.counterfactuals.engine.fan_out import CleanBlock, CleanExperts, clean_blocks, finish
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.requests import require_unhooked
from hooked_moe.expert_mask import LayerMask, keep_weights
from hooked_moe.kernels.weighted_sum import masked_combine
from hooked_moe.transformer import Transformer

AnyRemoval = Literal["zero", "renormalize", "reroute", "mean"]
Keep = Bool[Tensor, "variant #batch #pos slot"] | Float[Tensor, "variant #batch #pos slot"]
ExpertMeans = Mapping[int, Float[Tensor, "expert d_model"]]
"""By layer: the mean output of each expert, before weighting; nan for experts that were never selected."""


def check_any_removal(removal: str, means: ExpertMeans | None, layers: Iterable[int]) -> None:
    """Raise `ValueError` unless the removal is known and the means it needs are there."""
    if removal not in get_args(AnyRemoval):
        raise ValueError(f"removal must be one of {', '.join(map(repr, get_args(AnyRemoval)))}, not {removal!r}")
    if (removal == "mean") != (means is not None):
        raise ValueError("removal='mean' and means= go together: pass means=expert_means(model, reference_tokens)")
    missing = [layer for layer in layers if means is not None and layer not in means]
    if missing:
        raise ValueError(f"means has no layers {missing}; it has {sorted(means or ())}")


def with_experts(clean: CleanBlock) -> CleanExperts:
    """The block as one with experts, which it must be."""
    assert isinstance(clean, CleanExperts), f"layer {clean.layer} has no experts"
    return clean


def each_slot_removed(clean: CleanExperts) -> Keep:
    """Variant j removes the expert of slot j."""
    slots = clean.routing.weights.shape[-1]
    return ~torch.eye(slots, dtype=torch.bool, device=clean.routing.weights.device)[:, None, None, :]


def in_windows(keep: Shaped[Tensor, "variant #batch #query slot"], clean: CleanExperts, width: int) -> Keep:
    """What to keep at each query, for windows of tokens that start there: all of their later tokens."""
    if width == 1:
        return keep
    batch, tokens, _ = clean.routing.indices.shape
    keep = keep.expand(-1, batch, tokens // width, -1)
    whole = torch.ones(len(keep), batch, tokens, keep.shape[-1], dtype=keep.dtype, device=keep.device)
    whole[:, :, ::width] = keep
    return whole


def each_slot_removed_in_windows(clean: CleanExperts, width: int) -> Keep:
    """Variant j removes the expert of slot j of a window's first token, there and wherever a later token goes to it too."""
    indices = clean.routing.indices.unflatten(1, (-1, width))
    removed = indices[:, :, :1, :].movedim(-1, 0).unsqueeze(-1)  # [slot, batch, query, 1, 1]: the expert of each variant
    return (indices != removed).flatten(2, 3)


def without(
    clean: CleanExperts, keep: Keep, removal: AnyRemoval, means: ExpertMeans | None = None
) -> Float[Tensor, "variant batch pos d_model"]:
    """The residual stream after the block when only the slots in `keep` contribute, or each by its share.

    "mean" puts the expert's mean output in place of what is left out.
    """
    indices, weights = clean.routing
    if removal == "reroute":
        experts = torch.ones(len(keep), *indices.shape[:2], clean.moe.num_experts, dtype=torch.bool, device=indices.device)
        return rerouted(clean, experts.scatter(-1, indices.expand(len(keep), *indices.shape), keep.expand(-1, *indices.shape)))
    kept = keep_weights(weights, keep, "zero" if removal == "mean" else removal).to(weights.dtype)
    if removal != "mean":
        return combine_onto(clean.resid_mid, clean.expert_outputs, kept, clean.shared_out)
    assert means is not None
    routed = masked_combine(*clean.expert_outputs, kept)
    routed = routed + masked_combine(_known(means, clean), indices, weights - kept)
    return clean.resid_mid + add_shared(routed, clean.shared_out)


def rerouted(clean: CleanExperts, keep: Bool[Tensor, "variant #batch #pos expert"]) -> Float[Tensor, "variant batch pos d_model"]:
    """The residual stream after the block when every token goes to the best experts of those in `keep`, active or not."""
    shape = (*clean.routing.indices.shape[:2], clean.moe.num_experts)
    masks = (LayerMask(kept.expand(shape), "reroute") for kept in keep)
    return torch.stack([clean.resid_mid + clean.moe(clean.mlp_input, mask) for mask in masks])


def _known(means: ExpertMeans, clean: CleanExperts) -> Float[Tensor, "expert d_model"]:
    """The means of a layer. Raises `ValueError` if one that is needed is not known, or the shape is another."""
    mean, expected = means[clean.layer], (clean.moe.num_experts, clean.resid_mid.shape[-1])
    if mean.shape != expected:
        raise ValueError(f"means of layer {clean.layer} have shape {list(mean.shape)}; expected {list(expected)}")
    used = clean.routing.indices.unique()
    unknown = used[mean[used].isnan().any(-1)].tolist()
    if unknown:
        raise ValueError(
            f"experts {unknown} of layer {clean.layer} have no mean: no reference token went to them; use a longer reference"
        )
    return mean.nan_to_num().to(clean.resid_mid)


Reference = Int[Tensor, "_batch _pos"] | str | list[str]  # axes unbound: batches may differ in shape


@torch.inference_mode(False)
@without_autocast()
def expert_means(model: Transformer, reference: Reference | Iterable[Reference]) -> dict[int, Float[Tensor, "expert d_model"]]:
    """Mean output of every expert over the reference tokens routed to it, before weighting: {layer: [expert, d_model]}.

    `reference` is token ids [batch, pos] without padding, a text, or several such batches (streamed), where a list of texts is
    padded and its padding not counted. Means are in float32 or wider; nan for experts that no token went to. Raises
    `ValueError` for no reference at all, and while hooks are attached.
    """
    require_unhooked(model)
    batches = [reference] if isinstance(reference, Tensor | str) else reference
    cfg = model.cfg
    wide = torch.promote_types(cfg.dtype, torch.float32)
    sums = {layer: torch.zeros(cfg.experts_in(layer), cfg.d_model, dtype=wide, device=cfg.device) for layer in cfg.moe_layers}
    counts = {layer: torch.zeros(cfg.experts_in(layer), device=cfg.device) for layer in cfg.moe_layers}

    def add(clean: CleanBlock, real: Bool[Tensor, "batch pos"]) -> None:
        if isinstance(clean, CleanExperts):
            experts = clean.routing.indices[real].flatten()
            outputs = clean.expert_outputs.in_slots()[real].flatten(0, 1)
            sums[clean.layer].index_add_(0, experts, at_least_float32(outputs))
            counts[clean.layer] += torch.bincount(experts, minlength=len(counts[clean.layer]))

    measured = False
    with torch.inference_mode():
        for batch in batches:
            packed = pack(*model.as_tokens(batch))
            finish(clean_blocks(model, packed.tokens, partial(add, real=packed.source >= 0)))
            measured = True
    if not measured:
        raise ValueError("no reference to take means over: it has no batches")
    return {layer: sums[layer] / counts[layer].where(counts[layer] > 0, float("nan"))[:, None] for layer in sums}
