"""Keys and values of earlier tokens, so that generating a token costs one token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.checks import whole_number


class LayerCache:
    """The keys and values of one layer, as attention uses them: normalised, clipped and rotated."""

    def __init__(self, keys: Rows | None = None, values: Rows | None = None) -> None:
        self._keys, self._values = keys, values

    @property
    def keys(self) -> Float[Tensor, "batch pos kv_head d_head"] | None:
        return None if self._keys is None else self._keys.tensor

    @property
    def values(self) -> Float[Tensor, "batch pos kv_head d_value"] | None:
        return None if self._values is None else self._values.tensor

    def extend(
        self, keys: Float[Tensor, "batch pos kv_head d_head"], values: Float[Tensor, "batch pos kv_head d_value"]
    ) -> tuple[Float[Tensor, "batch key_pos kv_head d_head"], Float[Tensor, "batch key_pos kv_head d_value"]]:
        """Keep those of new tokens; returns those of all tokens so far."""
        self._keys = Rows.of(keys) if self._keys is None else self._keys.and_then(keys)
        self._values = Rows.of(values) if self._values is None else self._values.and_then(values)
        return self._keys.tensor, self._values.tensor

    def copy(self) -> LayerCache:
        """Another that has the same so far."""
        return LayerCache(self._keys, self._values)


class Rows:
    """Keys or values of some tokens, in memory with room for those of tokens to come; what it has never changes.

    Memory is shared with what these were extended to. Whoever extends first writes beside them, and any other makes a copy.
    """

    def __init__(self, memory: Memory, length: int) -> None:
        self._memory, self.length = memory, length
        self.tensor: Float[Tensor, "batch pos kv_head e"] = memory.tensor[:, :length]

    @classmethod
    def of(cls, tensor: Float[Tensor, "batch pos kv_head e"]) -> Rows:
        return cls(Memory(tensor, tensor.shape[1]), tensor.shape[1])

    def and_then(self, new: Float[Tensor, "batch more kv_head e"]) -> Rows:
        """These and some more. Where gradients are wanted, in memory of its own, which nobody writes to again."""
        if torch.is_grad_enabled():
            return Rows.of(torch.cat((self.tensor, new), dim=1))
        memory, length = self._memory, self.length + new.shape[1]
        if not memory.takes(self.length, length):
            batch, _, *rest = new.shape
            memory = Memory(new.new_empty(batch, length + max(64, length // 4), *rest), self.length)
            memory.tensor[:, : self.length] = self.tensor
        memory.tensor[:, self.length : length] = new
        memory.used = length
        return Rows(memory, length)


class Memory:
    """Of as many tokens as it has room for, of which so many are `used`."""

    def __init__(self, tensor: Float[Tensor, "batch pos kv_head e"], used: int) -> None:
        self.tensor, self.used = tensor, used

    def takes(self, start: int, end: int) -> bool:
        """Whether tokens may be written there: nobody has, there is room, and torch lets this mode write to it."""
        writable = torch.is_inference_mode_enabled() or not self.tensor.is_inference()
        return self.used == start and end <= self.tensor.shape[1] and writable


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
        draft.layers = [layer.copy() for layer in self.layers]
        draft.real = self.real
        return draft

    def adopt(self, draft: KeyValueCache) -> None:
        """Take over what a pass added to a draft."""
        self.layers, self.real = draft.layers, draft.real

    def extend_mask(self, new: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch all_pos"]:
        """Keep which new tokens are real; returns it of all tokens so far."""
        self.real = new if self.real is None else torch.cat((self.real, new), dim=1)
        return self.real
