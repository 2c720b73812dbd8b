"""Keys and values of earlier tokens, so that generating a token costs one token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.checks import whole_number


class LayerCache:
    """The keys and values of one layer, as attention uses them: normalised, clipped and rotated."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys = keys
        self.values = values

    def extend(
        self, keys: Float[Tensor, "batch pos kv_head d_head"], values: Float[Tensor, "batch pos kv_head d_value"]
    ) -> tuple[Float[Tensor, "batch key_pos kv_head d_head"], Float[Tensor, "batch key_pos kv_head d_value"]]:
        """Keep those of new tokens; returns those of all tokens so far."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=1)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=1)
        return self.keys, self.values


class KeyValueCache:
    """What `HookedMoE.forward` needs of earlier tokens to run the next ones alone: keys and values, and which were padding.

    `width` is how long the rows may become; an expert mask then covers that many positions. None: as long as they are.
    """

    def __init__(self, n_layers: int, width: int | None = None) -> None:
        self.width = None if width is None else whole_number(width, "width")
        self.layers = [LayerCache() for _ in range(whole_number(n_layers, "n_layers"))]
        self.real: Bool[Tensor, "batch pos"] | None = None

    @property
    def length(self) -> int:
        """How many tokens of each row have been run."""
        return 0 if self.real is None else self.real.shape[1]

    def draft(self) -> KeyValueCache:
        """A copy for a pass to extend, until `adopt` takes it over: a pass that fails in between changes nothing here."""
        draft = KeyValueCache(0, self.width)
        draft.layers = [LayerCache(layer.keys, layer.values) for layer in self.layers]
        draft.real = self.real
        return draft

    def adopt(self, draft: KeyValueCache) -> None:
        """Take over what a pass added to a draft."""
        self.layers, self.real = draft.layers, draft.real

    def extend_mask(self, new: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch all_pos"]:
        """Keep which new tokens are real; returns it of all tokens so far."""
        self.real = new if self.real is None else torch.cat((self.real, new), dim=1)
        return self.real
