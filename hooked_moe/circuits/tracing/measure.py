"""All patches of a batch of corrupted runs, measured exactly: each is one token through the later layers, and with it, where a
token before the last is patched, those up to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.tracing.batches import Batch
from hooked_moe.circuits.tracing.controls import random_directions
from hooked_moe.circuits.tracing.observed import ObservedRun, observe
from hooked_moe.circuits.tracing.patches import LayerPatches, layer_patches, slots_of
from hooked_moe.circuits.tracing.readings import Answers, answer_direction
from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals import At, LogitDifference, Queries, VariantQueries, expert_effects, token_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class Measured:
    """What came of one batch; a row is one corrupted run, a spot one of its tokens that are patched."""

    batch: Batch
    clean: ObservedRun
    corrupted: ObservedRun
    patches: list[LayerPatches]
    margin_clean: Float[Tensor, " row"]
    """Logit of the true answer minus the foil's."""
    margin_corrupt: Float[Tensor, " row"]
    rank_clean: Float[Tensor, " row"]
    """How many tokens are likelier than the true answer in the clean run."""
    rescue: Float[Tensor, "layer variant spot reading"]
    """By `LayerPatches.variants`."""
    all_moe: Float[Tensor, "spot reading"]
    """The MLP outputs of all layers patched together."""
    direct: Float[Tensor, "layer slot spot"]
    """What an expert's patch writes into the logit difference itself, past all later layers, the final norm's scale as it was;
    nothing at tokens before the last, from which the prediction is not read."""
    first_order: Float[Tensor, "layer slot spot"]
    """The gradient of the logit difference times the patch."""
    necessity: Float[Tensor, "layer slot spot"]
    """The change of the clean run's logit difference when the expert is removed from the clean run's token."""


def measure(
    model: Transformer, batch: Batch, readings: Sequence[str], memory_budget: int | str | None = None, necessity: bool = True
) -> Measured:
    """Every patch of every layer at every spot of the batch, read at the last tokens."""
    with torch.no_grad():
        clean_start = model.embed(batch.clean)
        corrupted_start = model.embed(batch.corrupted) if batch.embeddings is None else batch.embeddings
    cfg, k = model.cfg, model.cfg.experts_per_token
    clean = observe(model, clean_start, batch)
    asked = [None if layer.experts is None else layer.experts.indices for layer in clean.layers]
    corrupted = observe(model, corrupted_start, batch, asked)
    directions = random_directions(batch.spots.seeds, cfg.n_layers, k, cfg.d_model, cfg.device)
    patches = [layer_patches(*each) for each in zip(clean.layers, corrupted.layers, directions, strict=True)]
    clean_logits = clean.logits(model)
    answers = Answers(batch.true, batch.foil, clean_logits.log_softmax(-1), readings)
    deltas = torch.stack([layer.variants(k) for layer in patches])
    rows = torch.arange(len(batch.final), device=batch.final.device)
    absolute = [answers.absolute(model, run.resid[:, None], rows)[:, 0] for run in (clean, corrupted)]
    rank = (clean_logits > clean_logits.gather(1, batch.true[:, None])).sum(1)
    experts = deltas[:, slots_of("whole", k)]
    direct = _direct(model, batch, corrupted, experts)
    return Measured(
        batch=batch,
        clean=clean,
        corrupted=corrupted,
        patches=patches,
        margin_clean=absolute[0][:, 0],
        margin_corrupt=absolute[1][:, 0],
        rank_clean=rank.float(),
        rescue=_rescue(model, batch, answers, deltas, memory_budget),
        all_moe=_all_moe(model, batch, answers, clean),
        direct=direct,
        first_order=_along(experts, _gradients(model, corrupted, batch)),
        necessity=_necessity(model, batch, patches, memory_budget) if necessity else torch.full_like(direct, float("nan")),
    )


def _rescue(
    model: Transformer,
    batch: Batch,
    answers: Answers,
    deltas: Float[Tensor, "layer variant spot d_model"],
    memory_budget: int | str | None,
) -> Float[Tensor, "layer variant spot reading"]:
    """Exactly zero where a patch changes nothing."""

    def edit(clean: CleanBlock, queries: Queries) -> Tensor:
        return clean.resid_post + deltas[clean.layer][:, batch.spot_at[queries.batch, queries.pos]]

    effects = token_effects(
        model,
        batch.corrupted,
        edit,
        n_variants=deltas.shape[1],
        positions=batch.spot_at >= 0,
        attention_mask=batch.real,
        readouts=[At(-1, answers)],
        embeddings=batch.embeddings,
        memory_budget=memory_budget,
    )
    (readings,) = effects.readouts.values()
    rescue = readings[:, :, batch.spots.row, batch.spots.pos]
    return torch.where((deltas != 0).any(-1)[..., None], rescue, 0.0)


def _all_moe(model: Transformer, batch: Batch, answers: Answers, clean: ObservedRun) -> Float[Tensor, "spot reading"]:
    """The clean run's MLP outputs in every layer, over the patched run's own attention outputs."""

    def edit(own: CleanBlock, queries: VariantQueries) -> Tensor:
        return own.resid_mid + clean.layers[own.layer].mlp_out[batch.spot_at[queries.batch, queries.pos]]

    effects = token_effects(
        model,
        batch.corrupted,
        dict.fromkeys(range(model.cfg.n_layers), edit),
        positions=batch.spot_at >= 0,
        attention_mask=batch.real,
        readouts=[At(-1, answers)],
        embeddings=batch.embeddings,
    )
    (readings,) = effects.readouts.values()
    return readings[0, 0, batch.spots.row, batch.spots.pos]


def _direct(
    model: Transformer, batch: Batch, corrupted: ObservedRun, experts: Float[Tensor, "layer slot spot d_model"]
) -> Float[Tensor, "layer slot spot"]:
    scale = (corrupted.resid.square().mean(-1, keepdim=True) + model.ln_final.eps).sqrt()
    direction = answer_direction(model, batch.true, batch.foil) * at_least_float32(model.ln_final.w) / scale
    written = (at_least_float32(experts) * direction[batch.spots.row]).sum(-1)
    return torch.where(batch.spots.pos == batch.final[batch.spots.row], written, 0.0)


def _along(
    experts: Float[Tensor, "layer slot spot d_model"], gradients: Float[Tensor, "layer spot d_model"]
) -> Float[Tensor, "layer slot spot"]:
    return (at_least_float32(experts) * at_least_float32(gradients)[:, None]).sum(-1)


@torch.inference_mode(False)
def _gradients(model: Transformer, corrupted: ObservedRun, batch: Batch) -> Float[Tensor, "layer spot d_model"]:
    """Of the corrupted run's logit difference, by the residual stream after each layer at the spots.

    Block by block from the last down, each run again from what came before it: a streamed model is read once more, backwards.
    """
    rows = torch.arange(len(batch.final), device=batch.final.device)
    *streams, last = corrupted.streams
    with torch.enable_grad():
        resid = last.detach().clone().requires_grad_()
        final = model.ln_final(at_least_float32(resid[rows, batch.final]))
        margin = (final * answer_direction(model, batch.true, batch.foil)).sum()
        (gradient,) = torch.autograd.grad(margin, resid)
        gradients = [gradient]
        for layer in range(model.cfg.n_layers - 1, 0, -1):
            resid = streams[layer].detach().clone().requires_grad_()
            after = model(resid, start_at_layer=layer, stop_at_layer=layer + 1, attention_mask=batch.real)
            (gradient,) = torch.autograd.grad(after, resid, gradient)
            gradients.append(gradient)
    return torch.stack([gradient[batch.spots.row, batch.spots.pos] for gradient in reversed(gradients)])


def _necessity(
    model: Transformer, batch: Batch, patches: list[LayerPatches], memory_budget: int | str | None
) -> Float[Tensor, "layer slot spot"]:
    """By exact removal from the clean run; nan for experts that are not active there."""
    removals = expert_effects(
        model,
        batch.clean,
        positions=batch.spot_at >= 0,
        attention_mask=batch.real,
        readouts=[At(-1, LogitDifference(batch.true, batch.foil))],
        memory_budget=memory_budget,
    )
    (changes,) = removals.readouts.values()
    spots = (batch.spots.row, batch.spots.pos)
    shape = (len(patches), 2 * model.cfg.experts_per_token, len(batch.spots.row))
    result = torch.full(shape, float("nan"), dtype=torch.float32, device=batch.final.device)
    for number, layer in enumerate(removals.layers):
        experts = patches[layer].experts
        assert experts is not None
        change, removed = changes[number][spots], removals.expert_index[number][spots]
        same = experts.indices[:, :, None] == removed[:, None, :]
        found = torch.where(same, change[:, None, :], 0.0).sum(-1).masked_fill(~same.any(-1), float("nan"))
        result[layer] = found.T
    return result
