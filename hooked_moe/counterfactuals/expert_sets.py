"""Sets of experts removed, or scaled, together at one token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from hooked_moe.checks import by_number
from hooked_moe.counterfactuals.engine.answer import answer
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.padding import Packed
from hooked_moe.counterfactuals.engine.question import Question, Variants
from hooked_moe.counterfactuals.engine.readout import Readout
from hooked_moe.counterfactuals.engine.requests import Embeddings, Mask, Positions, Tokens, checked_n_variants, make_request
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.counterfactuals.removals import Removal, as_removal, at_window_starts_only
from hooked_moe.counterfactuals.results import VariantEffects, as_variant_effects
from hooked_moe.transformer import Transformer


@pausable
def mask_effects(
    model: Transformer,
    tokens: Tokens,
    masks: Mapping[int, Tensor],
    removal: Removal | str = "zero",
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    readouts: Iterable[Readout] = (),
    embeddings: Embeddings | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Steps[VariantEffects]:
    """Remove sets of experts (coalitions), or scale them, at one token at a time, and measure the loss there.

    `masks` maps a layer to a bool or float tensor that broadcasts to [variant, batch, pos, expert], with as many variants in
    every layer: True (1.0) keeps an expert's contribution at that token. All else as in `expert_effects` at `scope="position"`;
    "reroute" takes bool masks. Raises `ValueError` for masks that do not fit.
    """
    masks = by_number(masks, "layer")
    request = make_request(
        model, tokens, list(masks), positions, attention_mask, readouts, memory_budget, embeddings=embeddings, progress=progress
    )
    removal = as_removal(removal)
    removal.check_layers(request.layers)
    shape = (len(request.packed.rows), request.packed.original_length)
    full = {layer: _full_mask(model, layer, masks[layer], shape, removal) for layer in request.layers}
    counts = sorted({len(mask) for mask in full.values()})
    if len(counts) > 1:
        raise ValueError(f"every layer must have as many masks as the others; got {counts}")
    return as_variant_effects((yield from answer(Masked(checked_n_variants(counts[0]), removal, full), request)))


@dataclass(frozen=True, eq=False)
class Masked(Question):
    n_variants: int
    removal: Removal
    masks: dict[int, Shaped[Tensor, "variant batch pos expert"]]
    """By layer, at original positions."""

    def branch(self, clean: CleanBlock, packed: Packed, width: int) -> Variants:
        experts = as_expert_block(clean)
        keep = self.masks[clean.layer][:, packed.rows[:, None], packed.original_query_positions().clamp(min=0)]
        return self.removal.without_experts(experts, at_window_starts_only(keep, experts, width))


def _full_mask(
    model: Transformer, layer: int, mask: Tensor, shape: tuple[int, int], removal: Removal
) -> Shaped[Tensor, "variant batch pos expert"]:
    removal.check_mask(layer, mask)
    expected = (mask.shape[0] if mask.dim() == 4 else 1, *shape, model.cfg.experts_in(layer))
    try:
        return mask.to(model.cfg.device).expand(expected)
    except RuntimeError as error:
        raise ValueError(
            f"the masks of layer {layer} have shape {list(mask.shape)}; they must broadcast to "
            f"[variant, batch, pos, expert] = [any, {', '.join(map(str, expected[1:]))}]"
        ) from error
