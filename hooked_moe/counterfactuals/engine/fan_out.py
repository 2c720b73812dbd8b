"""Exact counterfactuals at single tokens, all of them in one sweep over the layers.

A change at position t in layer l leaves positions < t and layers <= l untouched. So each variant is one token (or, to read
later tokens too, a window of them from t on) that goes through layers l+1.. on its own, over the clean run's keys and values
before t. Variants of all positions and layers travel together: where a block of the clean run costs one pass, so does the same
block of all variants that have entered by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.components.rotary import Rotation
from hooked_moe.counterfactuals.engine.chunks import chunk_size_on
from hooked_moe.counterfactuals.engine.clean_run import (
    CleanBlock,
    block_after_attention,
    clean_block,
    gather_positions,
    rotation_of,
)
from hooked_moe.counterfactuals.engine.lanes import Lanes, Variants
from hooked_moe.counterfactuals.engine.losses import loss_at, prediction_change
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.pick_losses import prediction_change_of_picks
from hooked_moe.counterfactuals.engine.products import AS_WRITTEN, Products, products_in, require_in_range
from hooked_moe.counterfactuals.engine.readout import Final, Readout
from hooked_moe.counterfactuals.engine.steps import Steps
from hooked_moe.counterfactuals.engine.windows import Windows
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.prefix_attention import window_attention
from hooked_moe.loading.spill import Waiting
from hooked_moe.transformer import Transformer

EXPERT_OUTPUTS = Scratch()
"""The experts' outputs of the variants that are in a block."""

Branch = Callable[[CleanBlock], Variants]
"""Makes the variants of one layer from the clean run at the tokens of the windows."""
EditAgain = Callable[[CleanBlock, int], Float[Tensor, "row token d_model"]]
"""Changes variants in a later layer too. A row is one variant of one batch row; from what they computed in the block, and the
number of the first variant, come the residual streams after it."""


class FanOut(NamedTuple):
    """Losses in nats; nan where there is no next token."""

    losses: Float[Tensor, "layer variant batch query"]
    """Each variant's, at its own position."""
    kl: Float[Tensor, "layer variant batch query"]
    """KL(clean || changed) of the prediction there; rounding may put it below zero."""
    baseline: Float[Tensor, "batch pos"]
    """The clean run's."""
    readouts: dict[str, Float[Tensor, "layer variant batch query *rest"]]
    final: Float[Tensor, "batch pos d_model"]
    """The clean run's last residual stream."""


def fan_out(
    model: Transformer,
    packed: Packed,
    lanes: Lanes,
    branch: Branch,
    edits_again: Mapping[int, EditAgain] | None = None,
    readouts: Mapping[str, Readout] | None = None,
    waiting: Waiting | None = None,
    visit: Callable[[CleanBlock], Any] | None = None,
    chunk_size: int | None = None,
    products: torch.dtype | None = None,
) -> Steps[FanOut]:
    """Run the variants that `branch` makes in each layer of `lanes`, each read at its own position.

    `edits_again`, by layer, change them in later layers too. Between layers the variants stay in memory, or in the file
    `waiting`; `visit` is shown every block of the clean run, at all positions. `chunk_size` is how many tokens of variants go
    through a block together; `products` the dtype of what variants add to the clean run's products (`engine.products`).
    """
    batch, length = packed.tokens.shape
    cfg, windows, again = model.cfg, Windows(packed.query_positions, packed.width), edits_again or {}
    positions = windows.token_positions(batch, length, cfg.device)
    rotate = rotation_of(model, length)
    width = length if positions is None else positions.shape[1]
    shape = (math.prod(lanes.split), batch, width, cfg.d_model)
    chunk_size = chunk_size_on(cfg.device) if chunk_size is None else chunk_size
    variants: Tensor | None = None
    resid = packed.embed(model)
    for layer in range(cfg.n_layers):
        if waiting is not None and layer:
            waiting.get(resid := torch.empty(batch, length, cfg.d_model, dtype=cfg.dtype, device=cfg.device))
        made = products_in(products)
        with made.of_clean_run() as run_experts:
            clean = clean_block(model.blocks[layer], layer, resid, rotate, run_experts=run_experts)
        resid = clean.resid_post
        if visit is not None:
            visit(clean)
        if variants is None:
            variants = torch.empty(shape, dtype=cfg.dtype, device=cfg.device)
            if waiting is not None and layer:
                waiting.get(lanes.entered(variants, layer), place=resid.nbytes)
        under_way = lanes.under_way(variants, windows, layer, max(1, chunk_size // batch))
        _advance_lanes(under_way, clean, rotate, chunk_size, again, made)
        if lanes.sizes.get(layer):
            own_positions = None if positions is None else lanes.tokens_entering(positions, layer)
            lanes.entering(variants, layer).copy_(branch(clean.at_positions(own_positions)))
        del clean, made, run_experts, under_way  # while this task waits for others, it holds no more than it needs
        if layer + 1 == cfg.n_layers:
            break  # at once to the end: what waits here would wait in memory
        if waiting is not None:
            waiting.put(resid)
            waiting.put(lanes.entered(variants, layer + 1), place=resid.nbytes)
            del resid
            variants = None
        yield
    assert variants is not None
    EXPERT_OUTPUTS.release()
    targets, readings = windows.targets(packed.targets), {}
    if lanes.axis == 0:
        final = Final(model, variants, gather_positions(resid, positions), targets, packed)
        streams = final.at_window_starts(variants), final.at_window_starts(final.clean)
        targets = targets[:, :: packed.width]
        change = prediction_change(model, *streams, targets, products)
        readings = {name: readout(final).unflatten(0, lanes.split) for name, readout in (readouts or {}).items()}
    else:
        assert positions is not None, "every layer has its own tokens"
        assert not readouts, "picks are read by their losses alone"
        change = prediction_change_of_picks(model, variants[0], resid, positions, targets, products)
    if products == torch.float16:
        require_in_range(change.losses, targets, variants if packed.width > 1 else None)
    losses, kl = (values.unflatten(0, lanes.split) for values in change)
    if use_kernels(model.unembed.W_U):  # the two ways to a loss differ in their last bits: the clean run takes its variants'
        baseline = prediction_change(model, resid[None], resid, packed.targets, products).losses[0]
    else:
        baseline = loss_at(model, resid[None], packed.targets)[0]
    return FanOut(losses, kl, baseline, readings, resid)


def _advance_lanes(
    under_way: Iterable[tuple[Tensor, Windows]],
    clean: CleanBlock,
    rotate: Rotation,
    chunk_size: int,
    edits_again: Mapping[int, EditAgain],
    made: Products,
) -> None:
    """All variants that are under way, through a block. No name is left that would keep them in memory while their task waits."""
    for variants, windows in under_way:
        advance(variants, clean, rotate, windows, chunk_size, edits_again.get(clean.layer), made)


def advance(
    variants: Float[Tensor, "variant batch token d_model"],
    clean: CleanBlock,
    rotate: Rotation,
    windows: Windows,
    chunk_size: int,
    edit_again: EditAgain | None = None,
    made: Products = AS_WRITTEN,
) -> None:
    """Take every variant through a block, in place, over the clean run's keys and values, by products that are so `made`."""
    if not variants.numel():
        return
    block, attn = clean.block, clean.block.attn
    _, batch, tokens, _ = variants.shape
    positions = windows.token_positions(batch, clean.qkv.k.shape[1], variants.device)
    at_once = max(1, chunk_size // (batch * tokens))
    with made.of_variants(positions) as run_experts:
        for number, chunk in enumerate(variants.split(at_once)):
            count = len(chunk)
            own_rotation = rotate if positions is None else rotate.at(positions, count)
            x = chunk.flatten(0, 1)
            own = attn.project(block.ln1(x), own_rotation)
            q, k, v = (part.unflatten(0, (count, batch)) for part in own)
            prefix, reach = (clean.qkv.k, clean.qkv.v, windows.starts, windows.width), attn.window
            z = window_attention(q, k, v, *prefix, attn.cfg.attention_scale, sink=attn.sink, sliding_window=reach)
            resid_mid = x + attn.output(z.flatten(0, 1))
            after = block_after_attention(clean.layer, block, own, resid_mid, EXPERT_OUTPUTS, run_experts)
            edited = after.resid_post if edit_again is None else edit_again(after, number * at_once)
            chunk.copy_(edited.unflatten(0, (count, batch)))
