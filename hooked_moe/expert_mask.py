"""Expert masks: which (batch, pos, expert) contributions survive, layer by layer.

One forward evaluates a different mask in every batch row, so many counterfactuals run as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import WrongTypeError, as_int_or_none, by_number, described, in_list, whole_numbers
from hooked_moe.config import HookedMoEConfig

RemovalName = Literal["zero", "renormalize", "reroute"]
Entry = tuple[int, int | None, int | None, int]
AnyEntry = tuple[SupportsIndex, SupportsIndex | None, SupportsIndex | None, SupportsIndex]


class MaskTypeError(WrongTypeError):
    """A mask of the wrong type, which an expert mask and a request for effects refuse alike."""


def check_mask(layer: int, mask: Any, removal: str) -> None:
    """Raise `MaskTypeError` unless it is a bool or float tensor that the removal can use, and `ValueError` for its values."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskTypeError(f"the mask of layer {layer} must be a bool or float tensor, not {kind}")
    if removal == "reroute" and mask.dtype != torch.bool:
        raise MaskTypeError(f"removal='reroute' takes bool masks: an expert is routed to or not; layer {layer} has floats")
    if removal == "renormalize" and mask.dtype != torch.bool and bool((mask < 0).any()):
        raise ValueError(f"removal='renormalize' takes masks from 0: no rest could be rescaled; layer {layer} has negatives")


def check_removal(removal: str) -> None:
    if removal not in get_args(RemovalName):
        raise ValueError(f"removal must be one of {', '.join(map(repr, get_args(RemovalName)))}, not {removal!r}")


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer. `keep` is bool, or float to scale contributions instead of removing them."""

    keep: Bool[Tensor, "batch pos expert"] | Float[Tensor, "batch pos expert"]
    removal: RemovalName = "zero"

    @property
    def selectable(self) -> Bool[Tensor, "batch pos expert"] | None:
        """ "reroute": the experts that may be selected, so that the next-ranked one takes a removed one's slot. None: all."""
        return self.keep if self.removal == "reroute" else None

    def after_selection(
        self, weights: Float[Tensor, "batch pos slot"], indices: Int[Tensor, "batch pos slot"]
    ) -> Float[Tensor, "batch pos slot"]:
        """ "zero" and "renormalize": removed experts weigh nothing; the rest is rescaled to the same sum in the latter."""
        if self.removal == "reroute":
            return weights
        return keep_weights(weights, self.keep.gather(-1, indices), rescale=self.removal == "renormalize")


def keep_weights(weights: Float[Tensor, "*any slot"], keep: Tensor, rescale: bool = False) -> Float[Tensor, "*variants slot"]:
    """Routing weights times `keep` (broadcast), and with `rescale` rescaled to their old sum."""
    kept = weights * keep
    if rescale:
        rest = kept.sum(-1, keepdim=True)
        rescaled = torch.where(rest > 0, kept * weights.sum(-1, keepdim=True) / rest.where(rest > 0, 1.0), 0.0)
        same = (kept == weights).all(-1, keepdim=True)
        # nothing removed: not a bit changes, and the gradient is the rescaled one's
        kept = torch.where(same, weights.detach() + (rescaled - rescaled.detach()), rescaled)
    return kept


class ExpertMask:
    """Masks for any set of layers; layers without one are untouched. Shared experts are never masked.

    `keep` maps a layer to a bool or float tensor that broadcasts to [batch, pos, expert]; True (1.0) keeps a contribution.
    What a removal means (method of arXiv 2606.10703, where "zero" is the default):

    - "zero": the contribution is left out, nothing else changes;
    - "renormalize": the remaining routing weights are rescaled to the same sum;
    - "reroute": the next-ranked expert takes the slot, with its own routing weight (bool masks only).

    Masking an expert that a token is not routed to changes nothing (except under "reroute", where it cannot step in).
    """

    def __init__(self, keep: Mapping[int, Tensor], removal: RemovalName = "zero") -> None:
        check_removal(removal)
        self._keep = by_number(keep, "layer")
        for layer, tensor in self._keep.items():
            check_mask(layer, tensor, removal)
        self.removal: RemovalName = removal
        self._entries: dict[int, list[Entry]] = {}

    @classmethod
    def ablate(
        cls, entries: Iterable[AnyEntry] | Mapping[Any, Iterable[SupportsIndex]], removal: RemovalName = "zero"
    ) -> ExpertMask:
        """Remove single experts: `(layer, batch, pos, expert)`, where None for batch or pos means every one.

        Or `{layer: experts}`, everywhere: `{3: [5, 17]}` stands for `[(3, None, None, 5), (3, None, None, 17)]`.
        """
        mask = cls({}, removal)
        if isinstance(entries, Mapping):
            by_layer = by_number(entries, "layer")
            entries = [
                (i, None, None, e) for i, experts in by_layer.items() for e in whole_numbers(experts, f"experts of layer {i}")
            ]
        for values in in_list(entries, "entries", "[(layer, batch, pos, expert)]"):
            entry = _entry(values)
            mask._entries.setdefault(entry[0], []).append(entry)
        return mask

    @property
    def layers(self) -> list[int]:
        """The layers this mask touches."""
        return sorted({*self._keep, *self._entries})

    def for_layer(
        self, layer: int, shape: tuple[int, int, int], device: torch.device, positions: slice = slice(None)
    ) -> LayerMask | None:
        """The mask of one layer at (batch, pos, expert) = `shape`, if it has one, or the part of it at some positions.

        Raises `ValueError` if it does not fit.
        """
        if layer in self._keep:
            try:
                keep = self._keep[layer].to(device).broadcast_to(shape)
            except RuntimeError as error:
                got = list(self._keep[layer].shape)
                raise ValueError(
                    f"the mask of layer {layer} has shape {got}; it must broadcast to [batch, pos, expert] = {list(shape)}"
                ) from error
        elif layer in self._entries:
            keep = torch.ones(shape, dtype=torch.bool, device=device)
            for entry in self._entries[layer]:
                for name, index, size in zip(("batch", "pos", "expert"), entry[1:], shape, strict=True):
                    if index is not None and index >= size:
                        raise ValueError(f"{name} {index} in {entry} is out of range: this input has {name} 0 to {size - 1}")
                keep[tuple(slice(None) if index is None else index for index in entry[1:])] = False
        else:
            return None
        return LayerMask(keep[:, positions], self.removal)

    def check_layers(self, cfg: HookedMoEConfig) -> None:
        """Raise `ValueError` if a layer does not exist, or has no experts."""
        for layer in self.layers:
            if not 0 <= layer < cfg.n_layers:
                raise ValueError(f"expert mask for layer {layer}: the model has layers 0 to {cfg.n_layers - 1}")
            if not cfg.experts_in(layer):
                raise ValueError(
                    f"expert mask for layer {layer}, which is dense: it has no experts; layers {cfg.moe_layers} have"
                )


def _entry(entry: Any) -> Entry:
    """(layer, batch, pos, expert) as plain numbers, whatever array they came from; None only for batch and pos."""
    given = list(entry) if isinstance(entry, Iterable) else []
    numbers = [as_int_or_none(value) for value in given]
    fits = len(given) == 4 and all(number is not None or given[at] is None for at, number in enumerate(numbers))
    if not fits or numbers[0] is None or numbers[3] is None or any(number is not None and number < 0 for number in numbers):
        raise ValueError(
            "(layer, batch, pos, expert) must be whole numbers from 0 (None: every batch, every pos), and entries are a list of "
            f"them, as in [(2, 0, 5, 17)], not {described(tuple(given) or entry)}"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]
