"""A model larger than memory: one block's weights at a time, the next read ahead.

Blocks are ordinary modules whose parameters are on the meta device until the block is asked for. A pass through the layers, up or
down, reads every weight once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn

from hooked_moe.checks import whole_number
from hooked_moe.components.block import Block
from hooked_moe.loading.checkpoint import Checkpoint, all_finite
from hooked_moe.loading.spill import Spill
from hooked_moe.transformer import Transformer
from weights_conversion.weight_map import Slot

WAITING_BYTES = 1 << 30
"""The bytes of residual streams that may wait in memory between layers; beyond that, they wait in files."""


class StreamedBlocks(nn.ModuleList):
    """Blocks that get their weights when they are taken out by number or in a loop, and lose them to the next one taken."""

    def __init__(self, blocks: list[Block], checkpoint: Checkpoint, copied: dict[str, Slot], device: torch.device) -> None:
        super().__init__(blocks)
        self.checkpoint = checkpoint
        self.device = device
        self.slots: list[dict[str, Slot]] = [{} for _ in blocks]
        for name, slot in copied.items():
            if slot.parameter.startswith("blocks."):
                self.slots[int(slot.parameter.split(".")[1])][name] = slot
        self.spill = Spill(WAITING_BYTES)
        self.blocks_read = 0
        """How often a block was read; a whole sweep over the layers reads each once."""
        self.bytes_read = 0
        """The bytes of their weights in the files."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[tuple[dict[str, Tensor], list[str]]]] | None = None
        self._loaded: int | None = None
        self._checked: set[int] = set()

    def __getitem__(self, layer: int) -> Block:  # type: ignore[override]
        layer = whole_number(layer, "a layer")
        layer = layer + len(self) if layer < 0 else layer
        if layer != self._loaded:
            self._load(layer)
        return cast(Block, self._modules[str(layer)])

    def __iter__(self) -> Iterator[Block]:
        return (self[layer] for layer in range(len(self)))

    def _load(self, layer: int) -> None:
        if not 0 <= layer < len(self):
            raise IndexError(f"layer {layer} is out of range: the model has layers 0 to {len(self) - 1}")
        previous = self._loaded
        if previous is not None:
            block = cast(Block, self._modules[str(previous)])
            self._loaded = None  # before it loses the first weight: an interrupt may leave it with some of them
            for name, parameter in list(block.named_parameters()):
                _set_parameter(block, name, torch.empty_like(parameter, device="meta"))
        ahead, self._ahead = self._ahead, None  # if reading failed, the next request tries again
        tensors, broken = ahead[1].result() if ahead is not None and ahead[0] == layer else self._read(layer)
        self.checkpoint.warn_of_non_finite(broken)  # here, where the caller's line is known, not where it was read ahead
        block = cast(Block, self._modules[str(layer)])
        for name, value in tensors.items():
            _set_parameter(block, name, value)
        self._loaded = layer
        following = self._following(previous, layer)
        if following in range(len(self)):
            self._ahead = (following, self._reader.submit(self._read, following))

    def _following(self, previous: int | None, layer: int) -> int:
        """The block that will be asked for next: the one below on the way down through the layers, and the one above on the way
        up. None such at the end, where a pass may turn round or begin again."""
        down = previous is not None and layer == previous - 1
        return layer - 1 if down else layer + 1

    @torch.no_grad()
    @torch.inference_mode(False)
    def _read(self, layer: int) -> tuple[dict[str, Tensor], list[str]]:
        """The parameters of a block, by their names in it, and which tensors have values that are not finite."""
        block = cast(Block, self._modules[str(layer)])
        likes = block.named_parameters()
        tensors = {name: torch.empty(like.shape, dtype=like.dtype, device=self.device) for name, like in likes}
        places = {name: slot.of(tensors[slot.parameter.split(".", 2)[2]]) for name, slot in self.slots[layer].items()}
        broken: dict[str, None] = {}
        for hf_name, values in self.checkpoint.read_into(places):
            if layer not in self._checked and not all_finite(values):
                broken[hf_name] = None
        self._checked.add(layer)
        self.blocks_read += 1
        self.bytes_read += sum(self.checkpoint.tensors[name].nbytes for name in places)
        return tensors, list(broken)


def spill_of(model: Transformer) -> Spill | None:
    """Where a streamed model's residual streams wait between layers; None for a model that is wholly in memory."""
    blocks: object = model.blocks  # declared as a sequence, which a ModuleList is not to a type checker
    return blocks.spill if isinstance(blocks, StreamedBlocks) else None


def _set_parameter(block: Block, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
