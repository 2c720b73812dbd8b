"""Experts in the vocabulary: what the stream says after each of them, and which words an expert writes.

expert_lens(model, "the gulf of", layer=5).top(5)
expert_vocabulary(model, layer=5, expert=18).tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.circuits.pairs import Clean, single_run
from hooked_moe.components.moe import MoE
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.counterfactuals.engine.clean_run import gather_positions
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.readout import by_name
from hooked_moe.counterfactuals.engine.requests import Mask, checked_layers
from hooked_moe.counterfactuals.later_readouts import At
from hooked_moe.counterfactuals.means import Reference, expert_means
from hooked_moe.counterfactuals.readouts import KL
from hooked_moe.counterfactuals.results import BATCH, TensorResult
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import Transformer


@dataclass(frozen=True, repr=False)
class ExpertLens(TensorResult):
    """Logits along one block at one token: before its experts, after each of them, and of what each writes alone."""

    steps: list[str]
    """"before", "slot 0" (the expert with the highest weight added), ..., "after" (shared experts too)."""
    logits: Float[Tensor, "batch step d_vocab"]
    """Of the residual stream so far, through the final norm. The last ones are those of the stream after the block."""
    own: Float[Tensor, "batch step d_vocab"]
    """Of what was added at this step alone; of "before" and "after", nan."""
    expert_index: Int[Tensor, "batch step"]
    """Which expert was added; -1 for none."""

    AXES: ClassVar = {"batch": BATCH, "step": Axis("what the stream holds by then", "name", "steps")}
    COLUMNS: ClassVar = {
        "expert_index": Column("batch step", "index", "expert that was added; -1 for none"),
        "logits": Column("batch step token", "logits", "of the residual stream so far"),
        "own": Column("batch step token", "logits", "of what was added alone; NaN before and after"),
    }

    def top(self, k: int = 5) -> Int[Tensor, "batch step k"]:
        """The ids of the tokens that the stream predicts most at every step."""
        return self.logits.topk(k, dim=-1).indices


@torch.no_grad()
@without_autocast()
def expert_lens(
    model: Transformer,
    cache: Clean,
    layer: int,
    pos: int = -1,
    attention_mask: Mask | None = None,
) -> ExpertLens:
    """What the model would predict at `pos` if it ended within a block: after each of the token's experts, by weight.

    The logit lens (nostalgebraist 2020) between experts. `pos` is counted as in `At`: -1 is each row's last token. `cache` is a
    run's cache, or the tokens or text to run. In the last layer the last step has the model's own logits.
    """
    (layer,) = checked_layers(model, [layer])
    run = single_run(model, cache, attention_mask)
    packed, place = pack(run.tokens, run.attention_mask), At(pos, KL())
    by_name([place], model, packed)
    at = place.original_positions(packed)[:, None]

    def here(x: Tensor) -> Tensor:
        return gather_positions(x, at)[:, 0]

    experts = run.experts("clean", layer)
    written = here(experts.weights)[..., None] * here(experts.outputs)
    before, after = here(run.resid_mid("clean", layer)), here(run.resid_post("clean", layer))
    streams = torch.cat(
        ((before[:, None] + torch.cat((torch.zeros_like(written[:, :1]), written), 1).cumsum(1)), after[:, None]), 1
    )
    nothing = torch.full_like(before[:, None], float("nan"))
    none = torch.full_like(at, -1)
    return ExpertLens(
        ["before", *(f"slot {slot}" for slot in range(written.shape[1])), "after"],
        model.logits(streams),
        model.logits(torch.cat((nothing, written, nothing), 1)),
        torch.cat((none, here(experts.indices), none), 1),
    )


@dataclass(frozen=True, repr=False)
class ExpertVocabulary(TensorResult):
    """The tokens that an expert's neurons, and its mean output, write for."""

    rows: list[str]
    """"mean", where there is a reference; then "neuron 0", ..."""
    token: Int[Tensor, "row rank"]
    logit: Float[Tensor, "row rank"]
    """Of the token, for a neuron at activation 1, through the final norm's weight and the unembedding."""
    tokens: list[list[str]]
    """The same as text; empty without a tokenizer."""

    AXES: ClassVar = {"row": Axis("mean output, or neuron", "name", "rows"), "rank": Axis("rank of the token; 0 is the highest")}
    COLUMNS: ClassVar = {
        "token": Column("row rank", "id", "token"),
        "logit": Column("row rank", "logits", "what the row adds to its logit, but for the scale of the final norm"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"tokens": self.tokens}


@torch.no_grad()
@without_autocast()
def expert_vocabulary(
    model: Transformer, layer: int, expert: int, k: int = 10, reference: Reference | None = None
) -> ExpertVocabulary:
    """The `k` tokens that each neuron of an expert promotes most, and, over a reference, its mean output.

    A neuron writes its column of the down projection; what that adds to every logit is read through the final norm's weight and
    the unembedding (Geva et al. 2022, arXiv 2203.14680). `reference` is tokens or text, as `expert_means` takes it. Raises
    `ValueError` for layers and experts that are not there.
    """
    (layer,) = checked_layers(model, [layer])
    mlp = model.blocks[layer].mlp
    assert isinstance(mlp, MoE)
    number = as_int_or_none(expert)
    if number is None or not 0 <= number < mlp.num_experts:
        raise ValueError(f"expert {expert!r} is out of range: layer {layer} has experts 0 to {mlp.num_experts - 1}")
    written = at_least_float32(mlp.experts.W_out[number]).T
    rows = [f"neuron {neuron}" for neuron in range(len(written))]
    if reference is not None:
        mean = expert_means(model, reference)[layer][number]
        if bool(mean.isnan().any()):
            raise ValueError(f"no token of the reference goes to expert {number} of layer {layer}: use a longer one")
        written, rows = torch.cat((mean.to(written)[None], written)), ["mean", *rows]
    logits = (written * at_least_float32(model.ln_final.w)) @ at_least_float32(model.unembed.W_U).T
    top = logits.topk(min(k, logits.shape[1]))
    texts = (
        [] if model.tokenizer is None else [[model.tokenizer.decode([token]) for token in row] for row in top.indices.tolist()]
    )
    return ExpertVocabulary(rows, top.indices, top.values, texts)
