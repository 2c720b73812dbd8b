"""What takes the place of experts that are left out of a block.

    expert_effects(model, tokens, removal="renormalize")
    expert_effects(model, tokens, removal=Mean(expert_means(model, reference)))

A removal of one's own is a subclass of `Removal` with a `name` and a `without`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hooked_moe.checks import by_number
from hooked_moe.components.moe import add_shared, combine_onto
from hooked_moe.counterfactuals.engine.clean_run import CleanExperts
from hooked_moe.counterfactuals.engine.question import Variants
from hooked_moe.expert_mask import LayerMask, check_mask, keep_weights
from hooked_moe.kernels.weighted_sum import masked_combine

Keep = Bool[Tensor, "variant #batch #token slot"] | Float[Tensor, "variant #batch #token slot"]
"""Which of a token's active experts contribute in each variant, or by which share."""
KeepExperts = Bool[Tensor, "variant #batch #token expert"] | Float[Tensor, "variant #batch #token expert"]
"""The same of all experts, active or not."""
ExpertMeans = Mapping[int, Float[Tensor, "expert d_model"]]
"""By layer: the mean output of each expert, before weighting; nan for experts that were never selected."""


class Removal(ABC):
    """A way to leave experts out."""

    name: ClassVar[str]

    @abstractmethod
    def without(self, clean: CleanExperts, keep: Keep) -> Variants:
        """The residual stream after the block when only the slots in `keep` contribute, or each by its share."""

    def without_experts(self, clean: CleanExperts, keep: KeepExperts) -> Variants:
        """The same, for what is said of all experts: what is said of inactive ones changes nothing."""
        indices = clean.routing.indices
        keep = keep.expand(len(keep), *indices.shape[:2], -1)
        return self.without(clean, keep.gather(-1, indices.expand(len(keep), *indices.shape)))

    def check_layers(self, layers: Iterable[int]) -> None:  # noqa: B027 (most removals can be made anywhere)
        """Raise `ValueError` if this removal cannot be made in one of these layers."""

    def check_mask(self, layer: int, mask: Tensor) -> None:
        """Raise `MaskTypeError` or `ValueError` for a mask that this removal cannot use."""
        check_mask(layer, mask, self.name)


class Zero(Removal):
    """The contribution is left out, nothing else changes (the default of arXiv 2606.10703)."""

    name = "zero"
    rescales: ClassVar[bool] = False

    def without(self, clean: CleanExperts, keep: Keep) -> Variants:
        weights = clean.routing.weights
        kept = keep_weights(weights, keep, rescale=self.rescales).to(weights.dtype)
        return combine_onto(clean.resid_mid, clean.expert_outputs, kept, clean.shared_out)


class Renormalize(Zero):
    """It is left out, and the remaining routing weights are rescaled to the same sum."""

    name = "renormalize"
    rescales = True


class Reroute(Removal):
    """The next-ranked expert takes the slot, with its own routing weight."""

    name = "reroute"

    def without(self, clean: CleanExperts, keep: Keep) -> Variants:
        indices = clean.routing.indices
        experts = torch.ones(len(keep), *indices.shape[:2], clean.moe.num_experts, dtype=torch.bool, device=indices.device)
        return self.without_experts(
            clean, experts.scatter(-1, indices.expand(len(keep), *indices.shape), keep.expand(-1, *indices.shape))
        )

    def without_experts(self, clean: CleanExperts, keep: KeepExperts) -> Variants:
        """Every token goes to the best experts of those in `keep`, active or not."""
        shape = (*clean.routing.indices.shape[:2], clean.moe.num_experts)
        masks = (LayerMask(of_variant.expand(shape), "reroute") for of_variant in keep)
        return torch.stack([clean.resid_mid + clean.moe(clean.mlp_input, mask) for mask in masks])


@dataclass(frozen=True, eq=False)
class Mean(Removal):
    """The expert's mean output over a reference takes its place: `Mean(expert_means(model, reference))`."""

    means: ExpertMeans

    name = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "means", by_number(self.means, "layer"))

    def check_layers(self, layers: Iterable[int]) -> None:
        missing = [layer for layer in layers if layer not in self.means]
        if missing:
            raise ValueError(f"the means have no layers {missing}; they have {sorted(self.means)}")

    def without(self, clean: CleanExperts, keep: Keep) -> Variants:
        indices, weights = clean.routing
        kept = keep_weights(weights, keep).to(weights.dtype)
        routed = masked_combine(*clean.expert_outputs, kept)
        routed = routed + masked_combine(self._known(clean), indices, weights - kept)
        return clean.resid_mid + add_shared(routed, clean.shared_out)

    def _known(self, clean: CleanExperts) -> Float[Tensor, "expert d_model"]:
        """The means of a layer. Raises `ValueError` if one that is needed is not known, or the shape is another."""
        mean, expected = self.means[clean.layer], (clean.moe.num_experts, clean.resid_mid.shape[-1])
        if mean.shape != expected:
            raise ValueError(f"means of layer {clean.layer} have shape {list(mean.shape)}; expected {list(expected)}")
        used = clean.routing.indices.unique()
        unknown = used[mean[used].isnan().any(-1)].tolist()
        if unknown:
            raise ValueError(
                f"experts {unknown} of layer {clean.layer} have no mean: no reference token went to them; use a longer reference"
            )
        return mean.nan_to_num().to(clean.resid_mid)


BY_NAME: dict[str, Removal] = {removal.name: removal for removal in (Zero(), Renormalize(), Reroute())}
"""The removals that a string stands for."""


def as_removal(removal: Removal | str) -> Removal:
    """The removal that was given, or that a string stands for. Raises `ValueError` for any other."""
    if isinstance(removal, Removal):
        return removal
    if removal not in BY_NAME:
        known = ", ".join(map(repr, BY_NAME))
        raise ValueError(
            f"removal must be one of {known}, or an object such as Mean(expert_means(model, reference)), not {removal!r}"
        )
    return BY_NAME[removal]


def each_slot_removed(clean: CleanExperts) -> Keep:
    """Variant j removes the expert of slot j."""
    slots = clean.routing.weights.shape[-1]
    return ~torch.eye(slots, dtype=torch.bool, device=clean.routing.weights.device)[:, None, None, :]


def each_slot_removed_from_here_on(clean: CleanExperts, width: int) -> Keep:
    """Variant j removes the expert of slot j of a window's first token, there and wherever a later token goes to it too."""
    indices = clean.routing.indices.unflatten(1, (-1, width))
    removed = indices[:, :, :1, :].movedim(-1, 0).unsqueeze(-1)  # [slot, batch, query, 1, 1]: the expert of each variant
    return (indices != removed).flatten(2, 3)


def at_window_starts_only(
    keep: Shaped[Tensor, "variant #batch #query kept"], clean: CleanExperts, width: int
) -> Shaped[Tensor, "variant #batch #token kept"]:
    """What to keep at each query, for windows of tokens that start there: everything of their later tokens."""
    if width == 1:
        return keep
    batch, tokens, _ = clean.routing.indices.shape
    keep = keep.expand(-1, batch, tokens // width, -1)
    whole = torch.ones(len(keep), batch, tokens, keep.shape[-1], dtype=keep.dtype, device=keep.device)
    whole[:, :, ::width] = keep
    return whole
