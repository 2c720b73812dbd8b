"""A clean and a corrupted run of prompts of the same length, and what each expert contributes in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooked_moe.components.moe import MoE
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.requests import Mask, Tokens, require_unhooked
from hooked_moe.transformer import Transformer

Clean = Mapping[str, Tensor] | Tokens
"""The clean run: its cache, or the tokens or text to run."""
Part = Literal["contribution", "content", "routing"]
Run = Literal["clean", "corrupt"]

_NEEDED = (
    "hook_embed",
    "attn.hook_z",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "hook_expert_indices",
    "hook_expert_weights",
    "hook_expert_out",
    "hook_resid_post",
)


def expert_activations(name: str) -> bool:
    """For `names_filter`: whether patches of experts need this activation of the clean run.

    _, clean_cache = model.run_with_cache(clean_tokens, names_filter=expert_activations)
    """
    return name.endswith(_NEEDED)


class LayerExperts(NamedTuple):
    """The active experts of one layer in one run."""

    indices: Int[Tensor, "batch pos slot"]
    weights: Float[Tensor, "batch pos slot"]
    outputs: Float[Tensor, "batch pos slot d_model"]
    """Before weighting."""


@dataclass(frozen=True, eq=False)
class PromptPair:
    """Both runs. Rows and positions are those of the tokens given, padding and all."""

    model: Transformer
    tokens: Int[Tensor, "batch pos"]
    """The corrupted prompts."""
    attention_mask: Bool[Tensor, "batch pos"] | None
    clean: Mapping[str, Tensor]
    corrupt: Mapping[str, Tensor]

    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where there is a token."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.attention_mask is None else self.attention_mask

    def activations(self, run: Run) -> Mapping[str, Tensor]:
        return self.clean if run == "clean" else self.corrupt

    def resid_pre(self, run: Run, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before a block."""
        return self.resid_post(run, layer - 1) if layer else self.activations(run)["hook_embed"]

    def resid_post(self, run: Run, layer: int = -1) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after a block; layer -1 is the last."""
        return self.activations(run)[f"blocks.{layer % self.model.cfg.n_layers}.hook_resid_post"]

    def experts(self, run: Run, layer: int) -> LayerExperts:
        prefix = f"blocks.{layer}.mlp.hook_expert_"
        return LayerExperts(*(self.activations(run)[prefix + name] for name in ("indices", "weights", "out")))

    def mlp_input(self, run: Run, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """What the router and the experts of a layer read."""
        return self.activations(run)[f"blocks.{layer}.ln2.hook_normalized"] * self.model.blocks[layer].ln2.w

    def resid_mid(self, run: Run, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream between attention and experts."""
        return self.activations(run)[f"blocks.{layer}.hook_resid_mid"]

    def z(self, run: Run, layer: int) -> Float[Tensor, "batch pos head d_value"]:
        """Each head's mix of values."""
        return self.activations(run)[f"blocks.{layer}.attn.hook_z"]

    def moe(self, layer: int) -> MoE:
        mlp = self.model.blocks[layer].mlp
        assert isinstance(mlp, MoE), f"layer {layer} has no experts"
        return mlp


@torch.no_grad()
@without_autocast()
def prompt_pair(model: Transformer, clean: Clean, corrupt: Tokens, attention_mask: Mask | None = None) -> PromptPair:
    """Run what is not run yet. Raises `ValueError` for prompts of other lengths, other padding, or while hooks are attached."""
    pair = clean_side(model, clean, corrupt, attention_mask)
    _, cache = model.run_with_cache(pair.tokens, None, attention_mask=pair.attention_mask, names_filter=expert_activations)
    return replace(pair, corrupt=cache)


@torch.no_grad()
@without_autocast()
def clean_side(model: Transformer, clean: Clean, corrupt: Tokens, attention_mask: Mask | None = None) -> PromptPair:
    """The same without the corrupted run."""
    require_unhooked(model)
    tokens, mask = model.as_tokens(corrupt, attention_mask)
    if not isinstance(clean, Mapping):
        clean_tokens, clean_mask = model.as_tokens(clean, attention_mask if isinstance(clean, Tensor) else None)
        if clean_tokens.shape != tokens.shape or not _same_padding(mask, clean_mask, tokens):
            raise ValueError(
                f"clean and corrupted prompts must have the same lengths and padding; they have "
                f"{_lengths(clean_tokens, clean_mask)} and {_lengths(tokens, mask)} tokens"
            )
        _, clean = model.run_with_cache(clean_tokens, None, attention_mask=clean_mask, names_filter=expert_activations)
    pair = PromptPair(model, tokens, mask, clean, {})
    found, expected = list(pair.resid_post("clean").shape[:2]), list(tokens.shape)
    if found != expected:
        raise ValueError(f"the clean cache is of {found} tokens, and the corrupted prompts are of {expected}: they must match")
    return pair


def single_run(model: Transformer, run: Clean, attention_mask: Mask | None) -> PromptPair:
    """One run, from its cache or made here, as both sides of a pair. Raises `ValueError` while hooks are attached: they would act
    on what is computed again of the cache."""
    require_unhooked(model)
    if not isinstance(run, Mapping):
        return prompt_pair(model, run, run, attention_mask)
    shape = run["hook_embed"].shape[:2]
    nothing = torch.zeros(shape, dtype=torch.long, device=model.cfg.device)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=model.cfg.device).bool()
    if mask is not None and mask.shape != shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; the cache is of {list(shape)} tokens")
    return PromptPair(model, nothing, mask, run, run)


def _same_padding(first: Tensor | None, second: Tensor | None, tokens: Tensor) -> bool:
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    return torch.equal(everywhere if first is None else first, everywhere if second is None else second)


def _lengths(tokens: Tensor, mask: Tensor | None) -> list[int]:
    return (torch.ones_like(tokens) if mask is None else mask).sum(-1).tolist()


class ActiveExperts(NamedTuple):
    """The experts that either run routes each token to, in one layer."""

    experts: Int[Tensor, "batch pos slot"]
    """-1 where there is none."""
    changed: Bool[Tensor, "batch pos slot"]
    """Whether anything differs between the runs."""
    clean_active: Bool[Tensor, "batch pos slot"]
    corrupt_active: Bool[Tensor, "batch pos slot"]


class ExpertDeltas(NamedTuple):
    """What putting each expert's part of the clean run into the corrupted one adds to the residual stream, in one layer."""

    experts: Int[Tensor, "batch pos slot"]
    """-1 where there is none."""
    delta: Float[Tensor, "batch pos slot d_model"]
    clean_active: Bool[Tensor, "batch pos slot"]
    corrupt_active: Bool[Tensor, "batch pos slot"]

    def where(self, kept: Bool[Tensor, "batch pos"]) -> ExpertDeltas:
        """No experts elsewhere."""
        own = kept[..., None] & (self.experts >= 0)
        return ExpertDeltas(
            torch.where(own, self.experts, -1),
            self.delta.masked_fill(~own[..., None], 0.0),
            self.clean_active & own,
            self.corrupt_active & own,
        )

    def active(self) -> ActiveExperts:
        """Without the vectors."""
        return ActiveExperts(self.experts, (self.delta != 0).any(-1), self.clean_active, self.corrupt_active)

    def in_slots(self, slots: int) -> ExpertDeltas:
        """The same in as many slots as others have: those beyond are empty."""
        fills = (-1, 0.0, False, False)
        return ExpertDeltas(*(_padded_slots(x, slots, fill) for x, fill in zip(self, fills, strict=True)))


def expert_deltas(pair: PromptPair, layer: int, part: Part = "contribution") -> ExpertDeltas:
    """Those of every token, in at least as many slots as the token with most of them needs."""
    corrupt, x = pair.experts("corrupt", layer), pair.mlp_input("corrupt", layer)
    deltas = deltas_between(pair.experts("clean", layer), corrupt, part, pair.moe(layer), x)
    return deltas.where(pair.real())


def deltas_between(
    clean: LayerExperts, corrupt: LayerExperts, part: Part, moe: MoE, corrupt_input: Float[Tensor, "batch pos d_model"]
) -> ExpertDeltas:
    """With w the routing weight and E the output of an expert, 0 where a run does not route the token to it:

    contribution: w_clean E_clean - w_corrupt E_corrupt; content: w_clean (E_clean - E_corrupt), the expert reading the clean
    run's input; routing: (w_clean - w_corrupt) E_corrupt. The last two, which need E_corrupt where the expert is not active,
    sum to the first.
    """
    experts = _union(clean.indices, corrupt.indices)
    clean_active, w_clean, e_clean = _at_experts(clean, experts)
    corrupt_active, w_corrupt, e_corrupt = _at_experts(corrupt, experts)
    if part == "contribution":
        delta = w_clean * e_clean - w_corrupt * e_corrupt
    else:
        outputs = moe.run_experts(corrupt_input, experts.clamp(min=0)).in_slots()
        e_corrupt = torch.where(corrupt_active[..., None], e_corrupt, outputs)
        delta = w_clean * (e_clean - e_corrupt) if part == "content" else (w_clean - w_corrupt) * e_corrupt
    return ExpertDeltas(experts, delta, clean_active, corrupt_active).where(torch.ones_like(experts[..., 0], dtype=torch.bool))


def check_part(part: Any) -> None:
    """Raise `ValueError` for what is no part of an expert's contribution."""
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(map(repr, get_args(Part)))}, not {part!r}")


def _padded_slots(x: Shaped[Tensor, "batch pos slot *rest"], slots: int, value: Any) -> Shaped[Tensor, "batch pos slots *rest"]:
    """As many slots as other layers have."""
    more = x.new_full((*x.shape[:2], slots - x.shape[2], *x.shape[3:]), value)
    return torch.cat((x, more), dim=2)


def _union(first: Int[Tensor, "batch pos k"], second: Int[Tensor, "batch pos k"]) -> Int[Tensor, "batch pos slot"]:
    """The experts of the first run, then those of the second alone; as many slots as the token with most of them needs."""
    new = (second[..., None] != first[..., None, :]).all(-1)
    order = new.logical_not().int().argsort(dim=-1, stable=True)
    others = torch.where(new, second, -1).gather(-1, order)[..., : int(new.sum(-1).max())]
    return torch.cat((first, others), dim=-1)


def _at_experts(
    run: LayerExperts, experts: Int[Tensor, "batch pos slot"]
) -> tuple[Bool[Tensor, "batch pos slot"], Float[Tensor, "batch pos slot 1"], Float[Tensor, "batch pos slot d_model"]]:
    """Whether a run routes each token to these experts, with which weight, and their outputs; 0 where it does not."""
    match = experts[..., :, None] == run.indices[..., None, :]
    active, slot = match.any(-1), match.int().argmax(-1)
    weights = run.weights.gather(-1, slot).masked_fill(~active, 0.0)
    outputs = run.outputs.gather(-2, slot[..., None].expand(*slot.shape, run.outputs.shape[-1]))
    return active, weights[..., None], outputs.masked_fill(~active[..., None], 0.0)
