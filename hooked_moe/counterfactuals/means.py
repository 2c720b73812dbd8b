"""Mean outputs of experts over a reference: what `Mean` puts in the place of an expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import WrongTypeError, described
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts, clean_blocks
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.requests import require_unhooked
from hooked_moe.counterfactuals.engine.steps import run_to_end
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

Reference = Int[Tensor, "_batch _pos"] | str | list[str]  # axes unbound: batches may differ in shape


@torch.inference_mode(False)
@without_autocast()
def expert_means(
    model: Transformer, reference: Reference | Iterable[Reference], *, progress: bool = False
) -> dict[int, Float[Tensor, "expert d_model"]]:
    """Mean output of every expert over the reference tokens routed to it, before weighting: {layer: [expert, d_model]}.

    `reference` is token ids [batch, pos] without padding, a text, or several such batches (streamed), where a list of texts is
    padded and its padding not counted; `progress` shows a bar that counts batches. Means are in float32 or wider; nan for experts
    that no token went to. Raises `ValueError` for no reference at all, and while hooks are attached.
    """
    require_unhooked(model)
    batches = [reference] if isinstance(reference, Tensor | str) else reference
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise WrongTypeError(f"reference must be token ids, a text, or several of these, not {described(reference)}")
    cfg = model.cfg
    wide = torch.promote_types(cfg.dtype, torch.float32)
    sums = {layer: torch.zeros(cfg.experts_in(layer), cfg.d_model, dtype=wide, device=cfg.device) for layer in cfg.moe_layers}
    counts = {layer: torch.zeros(cfg.experts_in(layer), dtype=torch.long, device=cfg.device) for layer in cfg.moe_layers}

    def add(clean: CleanBlock, real: Bool[Tensor, "batch pos"]) -> None:
        if isinstance(clean, CleanExperts):
            experts = clean.routing.indices[real].flatten()
            outputs = clean.expert_outputs.in_slots()[real].flatten(0, 1)
            sums[clean.layer].index_add_(0, experts, at_least_float32(outputs))
            counts[clean.layer] += torch.bincount(experts, minlength=len(counts[clean.layer]))

    measured, total = False, len(batches) if isinstance(batches, Sized) else None
    with torch.inference_mode(), progress_bar(total, "means", "batch", shown=progress) as bar:
        for batch in batches:
            packed = pack(*model.as_tokens(batch))
            run_to_end(clean_blocks(model, packed.embed(model), partial(add, real=packed.original_positions >= 0)))
            bar.update()
            measured = True
    if not measured:
        raise ValueError("no reference to take means over: it has no batches")
    return {layer: sums[layer] / counts[layer].to(wide)[:, None] for layer in sums}  # 0 / 0 is nan
