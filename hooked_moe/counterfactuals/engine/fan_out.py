"""Exact counterfactuals at single tokens, all of them in one sweep over the layers.

A change at position t in layer l leaves positions < t and layers <= l untouched. So each variant is one token (or, to read
later tokens too, a window of them from t on) that goes through layers l+1.. on its own, over the clean run's keys and values
before t. Variants of all positions and layers travel together: where a block of the clean run costs one pass, so does the same
block of all variants that have entered by then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_moe.components.attention import Attention, QueriesKeysValues
from hooked_moe.components.block import Block
from hooked_moe.components.moe import ExpertOutputs, MoE, Routing, combine_onto
from hooked_moe.components.precision import at_least_float32
from hooked_moe.components.rotary import Rotation, rotation
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.dispatch import use_kernels
from hooked_moe.kernels.prefix_attention import window_attention
from hooked_moe.kernels.target_loss import rows_per_chunk, shifted_target_loss, target_loss
from hooked_moe.loading.spill import Waiting
from hooked_moe.transformer import Transformer

TOKENS_AT_ONCE = 4096
"""Variant tokens that go through a block together on a CPU: some hundred for each expert, whose weights are packed anew for every
product."""
TOKENS_AT_ONCE_ON_GPU = 32 * 1024
"""The same on a GPU: some thousand tokens for each of 64 experts."""


EXPERT_OUTPUTS = Scratch()
"""Of the variants that are in a block."""


def tokens_at_once(device: torch.device) -> int:
    return TOKENS_AT_ONCE if device.type == "cpu" else TOKENS_AT_ONCE_ON_GPU


Clean = TypeVar("Clean", bound="CleanBlock")


@dataclass(frozen=True)
class CleanBlock:
    """What the clean run computed in one block."""

    layer: int
    block: Block
    qkv: QueriesKeysValues
    """At every position, whatever `at` and `rows` pick of the rest."""
    resid_mid: Float[Tensor, "batch pos d_model"]
    mlp_input: Float[Tensor, "batch pos d_model"]
    resid_post: Float[Tensor, "batch pos d_model"]

    def rows(self: Clean, rows: Int[Tensor, " row"]) -> Clean:
        """The same for some batch rows, which may repeat."""
        return self._map(lambda x: x[rows])

    def at(self: Clean, positions: Int[Tensor, "batch token"] | None) -> Clean:
        """The same at some positions only."""
        return self._map(lambda x: take(x, positions))

    def first_of(self: Clean, width: int) -> Clean:
        """Of windows of tokens, the first of each."""
        return self if width == 1 else self._map(lambda x: x[:, ::width])

    def _map(self: Clean, pick: Callable[[Tensor], Tensor]) -> Clean:
        return replace(self, **self._picked(pick))

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: pick(getattr(self, name)) for name in ("resid_mid", "mlp_input", "resid_post")}


@dataclass(frozen=True)
class CleanExperts(CleanBlock):
    """What it computed in a block with experts."""

    moe: MoE
    routing: Routing
    expert_outputs: ExpertOutputs
    shared_out: Float[Tensor, "batch pos d_model"] | None

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return super()._picked(pick) | {
            "routing": Routing(*map(pick, self.routing)),
            "expert_outputs": ExpertOutputs(self.expert_outputs.rows, pick(self.expert_outputs.place)),
            "shared_out": None if self.shared_out is None else pick(self.shared_out),
        }


@dataclass(frozen=True)
class Windows:
    """Which tokens are run: for each query of a row, the one at its start and `width - 1` after it.

    Windows lie in one axis, "token": query 0's tokens, then query 1's, ... What reaches over the end of the row repeats its
    last token, and counts for nothing.
    """

    starts: Int[Tensor, "batch query"] | None
    """None: every position of the row, in order."""
    width: int = 1

    def places(self, batch: int, length: int, device: torch.device) -> Int[Tensor, "batch token"] | None:
        """The position of every token; None for all positions in order."""
        if self.starts is None and self.width == 1:
            return None
        starts = torch.arange(length, device=device).expand(batch, length) if self.starts is None else self.starts
        return (starts[..., None] + torch.arange(self.width, device=device)).clamp(max=length - 1).flatten(1)

    def targets(self, targets: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch token"]:
        """The next token of every token; -1 where there is none, or over the end of the row."""
        places = self.places(targets.shape[0], targets.shape[1], targets.device)
        wanted = take(targets, places)
        if places is not None and self.width > 1:
            by_query = places.unflatten(1, (-1, self.width))
            beyond = by_query.diff(dim=-1, prepend=by_query[..., :1] - 1) == 0
            wanted = wanted.masked_fill(beyond.flatten(1), -1)
        return wanted


Branch = Callable[[CleanBlock], Float[Tensor, "variant batch token d_model"]]
"""Makes the variants of one layer from the clean run at the tokens of the windows: the residual stream after its block."""


@dataclass(frozen=True)
class Final:
    """Where variants end up: the residual streams before the final norm, of all variants of all layers and of the clean run."""

    model: Transformer
    variants: Float[Tensor, "variant batch token d_model"]
    clean: Float[Tensor, "batch token d_model"]
    targets: Int[Tensor, "batch token"]
    width: int

    def first(self, x: Shaped[Tensor, "*lead batch token d_model"]) -> Shaped[Tensor, "*lead batch query d_model"]:
        """The token where each window starts: the one that was changed."""
        return x[..., :: self.width, :]


Readout = Callable[[Final], Float[Tensor, "variant batch query *rest"]]
"""Makes numbers of the end of a fan-out, for each variant and query."""


class FanOut(NamedTuple):
    """Losses in nats; nan where there is no next token."""

    losses: Float[Tensor, "layer variant batch query"]
    """Of each variant at its own position."""
    baseline: Float[Tensor, "batch pos"]
    """Of the clean run."""
    readouts: dict[str, Float[Tensor, "layer variant batch query *rest"]]


Done = TypeVar("Done")
Steps = Generator[None, None, Done]
"""Work that pauses between layers, so that several can go through the layers side by side."""


def finish(steps: Steps[Done]) -> Done:
    """Run to the end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def side_by_side(works: Iterable[Steps[Any]]) -> Steps[None]:
    """Run several through the layers together: each waits until all have done a layer. What they return is lost."""
    active = list(works)
    while active:
        active = [work for work in active if goes_on(work)]
        yield


def goes_on(work: Steps[Any]) -> bool:
    """Run to the next pause; False if there was none."""
    try:
        next(work)
    except StopIteration:
        return False
    return True


def fan_out(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"],
    layers: Sequence[int],
    n_variants: int,
    branch: Branch,
    windows: Windows = Windows(None),
    readouts: Mapping[str, Readout] | None = None,
    waiting: Waiting | None = None,
    visit: Callable[[CleanBlock], Any] | None = None,
    at_once: int | None = None,
) -> Steps[FanOut]:
    """Run `n_variants` changes per layer of `layers` (in order) and query, each read at its own position.

    `targets` is the token that each position should predict, -1 where there is none. Tokens must be padded on the right only:
    what follows a position does not matter to it. Between layers the variants stay in memory, or in the file `waiting`; `visit`
    is shown every block of the clean run, at all positions. `at_once` is how many tokens of variants go through a block together.
    """
    batch, length = tokens.shape
    cfg = model.cfg
    places = windows.places(batch, length, cfg.device)
    rotate = rotation_of(model, length)
    count = n_variants * len(layers)
    width = length if places is None else places.shape[1]
    shape = (count, batch, width, cfg.d_model)
    variants: Tensor | None = None
    entered, resid = 0, model.embed(tokens)
    for layer in range(cfg.n_layers):
        if waiting is not None and layer:
            waiting.get(resid := torch.empty(batch, length, cfg.d_model, dtype=cfg.dtype, device=cfg.device))
        clean = clean_block(model.blocks[layer], layer, resid, rotate)
        resid = clean.resid_post
        if visit is not None:
            visit(clean)
        if variants is None:
            variants = torch.empty(shape, dtype=cfg.dtype, device=cfg.device)
            if waiting is not None and entered:
                waiting.get(variants[:entered], place=resid.nbytes)
        advance(variants[:entered], clean, rotate, windows, places, at_once)
        if layer in layers:
            variants[entered : entered + n_variants] = branch(clean.at(places))
            entered += n_variants
        del clean  # while this work waits for others, it holds no more than it needs
        if layer + 1 == cfg.n_layers:
            break  # at once to the end: what waits here would wait in memory
        if waiting is not None:
            waiting.put(resid)
            waiting.put(variants[:entered], place=resid.nbytes)
            del resid
            variants = None
        yield
    assert variants is not None
    EXPERT_OUTPUTS.release()
    final = Final(model, variants, take(resid, places), windows.targets(targets), windows.width)
    split = (len(layers), n_variants)
    at_start = final.targets[:, :: windows.width]
    losses = variant_losses(model, final.first(variants), final.first(final.clean), at_start).unflatten(0, split)
    read = {name: readout(final).unflatten(0, split) for name, readout in (readouts or {}).items()}
    # By operators, the two ways to a loss differ in their last bits: the clean run then takes that of its variants.
    losses_of = partial(variant_losses, clean=resid) if use_kernels(model.unembed.W_U) else loss_at
    return FanOut(losses, losses_of(model, resid[None], targets=targets)[0], read)


Attend = Callable[[Attention, QueriesKeysValues], Float[Tensor, "batch pos head d_value"]]


def attend_to_earlier(attn: Attention, qkv: QueriesKeysValues) -> Float[Tensor, "batch pos head d_value"]:
    """Every position sees all up to its own."""
    return attn.attend(qkv, None)


def clean_block(
    block: Block,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    rotate: Rotation,
    attend: Attend = attend_to_earlier,
) -> CleanBlock:
    """One block of an ordinary forward over rows padded on the right only, and all that variants need of it."""
    qkv = block.attn.project(block.ln1(resid), rotate)
    resid_mid = resid + block.attn.output(attend(block.attn, qkv))
    mlp_input = block.ln2(resid_mid)
    if not isinstance(block.mlp, MoE):
        return CleanBlock(layer, block, qkv, resid_mid, mlp_input, resid_mid + block.mlp(mlp_input))
    routing = block.mlp.route(mlp_input)
    outputs = block.mlp.run_experts(mlp_input, routing.indices)
    shared = block.mlp.run_shared(mlp_input)
    resid_post = combine_onto(resid_mid, outputs, routing.weights[None], shared)[0]
    return CleanExperts(layer, block, qkv, resid_mid, mlp_input, resid_post, block.mlp, routing, outputs, shared)


def clean_blocks(
    model: Transformer, tokens: Int[Tensor, "batch pos"], visit: Callable[[CleanBlock], Any]
) -> Steps[Float[Tensor, "batch pos d_model"]]:
    """The clean run alone: shows every block to `visit`, and returns the last residual stream."""
    rotate, resid = rotation_of(model, tokens.shape[1]), model.embed(tokens)
    for layer in range(model.cfg.n_layers):
        clean = clean_block(model.blocks[layer], layer, resid, rotate)
        resid = clean.resid_post
        visit(clean)
        del clean
        if layer + 1 < model.cfg.n_layers:
            yield
    return resid


def advance(
    variants: Float[Tensor, "variant batch token d_model"],
    clean: CleanBlock,
    rotate: Rotation,
    windows: Windows,
    places: Int[Tensor, "batch token"] | None,
    at_once: int | None = None,
) -> None:
    """Take every variant through a block, in place, over the clean run's keys and values."""
    if not len(variants):
        return
    block = clean.block
    _, batch, tokens, _ = variants.shape
    at_once = tokens_at_once(variants.device) if at_once is None else at_once
    for some in variants.split(max(1, at_once // (batch * tokens))):
        count = len(some)
        here = rotate if places is None else rotate.at(places, count)
        x = some.flatten(0, 1)
        own = block.attn.project(block.ln1(x), here)
        q, k, v = (part.unflatten(0, (count, batch)) for part in own)
        scale = block.attn.cfg.attention_scale
        z = window_attention(q, k, v, clean.qkv.k, clean.qkv.v, windows.starts, windows.width, scale)
        x = x + block.attn.output(z.flatten(0, 1))
        some.copy_(_after_mlp(block, x).unflatten(0, (count, batch)))


def _after_mlp(block: Block, resid: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
    """Added up and rounded as in the clean run."""
    x = block.ln2(resid)
    if not isinstance(block.mlp, MoE):
        return resid + block.mlp(x)
    routing = block.mlp.route(x)
    outputs = block.mlp.run_experts(x, routing.indices, EXPERT_OUTPUTS)
    return combine_onto(resid, outputs, routing.weights[None], block.mlp.run_shared(x))[0]


def loss_at(
    model: Transformer, resid: Float[Tensor, "variant batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "variant batch pos"]:
    """Loss of final residual streams at their targets; nan where the target is -1."""
    weight = model.unembed.W_U
    if use_kernels(weight):  # at all positions: to pick those with a target, the device would have to be waited for
        at_once = max(1, tokens_at_once(resid.device) // targets.numel())
        normalised = (model.ln_final(at_least_float32(some)).flatten(0, 2) for some in resid.split(at_once))
        parts = [target_loss(x, weight, targets.flatten().repeat(len(x) // targets.numel())) for x in normalised]
        return torch.cat(parts).view(resid.shape[:-1])
    losses = resid.new_full(resid.shape[:-1], float("nan"), dtype=torch.promote_types(resid.dtype, torch.float32))
    real = targets >= 0
    wanted, wide = targets[real], at_least_float32(weight)
    for variant, loss in zip(resid, losses, strict=True):  # a variant at a time bounds the float32 copies
        loss[real] = target_loss(model.ln_final(at_least_float32(variant[real])), wide, wanted)
    return losses


def variant_losses(
    model: Transformer,
    variants: Float[Tensor, "variant batch pos d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    targets: Int[Tensor, "batch pos"],
) -> Float[Tensor, "variant batch pos"]:
    """`loss_at` of many variants of the same tokens.

    In bfloat16 the clean run alone is unembedded in float32; of each variant, the change of its normalised stream is, in the
    weights' own dtype, which rounds the change of a logit by one part in 2^9 of itself and not the logit.
    """
    weight = model.unembed.W_U
    if weight.dtype != torch.bfloat16:
        return loss_at(model, variants, targets)
    losses = variants.new_full(variants.shape[:-1], float("nan"), dtype=torch.float32)
    rows, positions = (index.split(rows_per_chunk(weight, torch.float32)) for index in _measured(targets))
    wide = weight.float()
    for row, position in zip(rows, positions, strict=True):
        start = model.ln_final(clean[row, position].float())
        shifts = (model.ln_final(one[row, position].float()) - start for one in variants)  # one at a time in memory
        logits, wanted = F.linear(start, wide), targets[row, position].clamp(min=0)
        losses[:, row, position] = shifted_target_loss(logits, shifts, weight, wanted)
    return losses.masked_fill(targets < 0, float("nan"))


def _measured(targets: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and position of every token with a target; on a GPU of every token, for the others are found by waiting for it."""
    if targets.device.type == "cpu":
        row, position = (targets >= 0).nonzero(as_tuple=True)
        return row, position
    index = torch.arange(targets.numel(), device=targets.device)
    return index // targets.shape[1], index % targets.shape[1]


def take(x: Shaped[Tensor, "batch pos *rest"], positions: Int[Tensor, "batch query"] | None) -> Tensor:
    """The rows of `x` at the queried positions."""
    return x if positions is None else x[torch.arange(len(x), device=x.device)[:, None], positions]


def rotation_of(model: Transformer, length: int) -> Rotation:
    """The rotation of positions 0 to length - 1."""
    positions = torch.arange(length, device=model.cfg.device)[None]
    return rotation(positions, model.cfg)
