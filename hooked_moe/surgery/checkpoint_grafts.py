"""Grafts of two checkpoints that need not fit into memory together: which file each tensor is read from."""

from __future__ import annotations

import copy
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Generic

import torch

from hooked_moe.loading.beside import read_tokenizer
from hooked_moe.loading.checkpoint import Checkpoint
from hooked_moe.loading.placement import as_device
from hooked_moe.loading.pretrained import build_model, plan_copies, read_config
from hooked_moe.surgery.grafting import Model, check_same_architecture, check_same_tokenizer, default_places
from hooked_moe.surgery.parts import BLOCK_PARTS, Layers, Parts, Place, place_of
from weights_conversion import conversion_for


class CheckpointGrafts(Generic[Model]):
    """Grafts of two checkpoint directories: each is a model read from the files of both, loaded or streamed anew.

    `hooked_moe.surgery.graft_sweep` takes this in place of two models. Raises `ValueError` for configs or tokenizers that differ.
    """

    def __init__(
        self,
        model_class: type[Model],
        a: str | PathLike[str],
        b: str | PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stream: bool = False,
    ) -> None:
        self._class, self._device, self._stream = model_class, as_device(device), stream
        directories = Path(a), Path(b)
        self.cfg, other = (
            read_config(directory / "config.json")[1].replace(dtype=dtype, model_name=directory.name) for directory in directories
        )
        check_same_architecture(self.cfg, other)
        check_same_tokenizer(*(read_tokenizer(directory, self.cfg) for directory in directories))
        self._checkpoints = Checkpoint(directories[0]), Checkpoint(directories[1])
        self._names: dict[Place, list[tuple[str, str]]] = {}
        own, theirs = (self._tensors_by_parameter(checkpoint) for checkpoint in self._checkpoints)
        for parameter in own:
            if own[parameter] != theirs[parameter]:
                raise ValueError(
                    f"{a} and {b} store {parameter} under different names, {own[parameter][0]} and {theirs[parameter][0]}: "
                    "load one of them, and save it with save_pretrained"
                )
            self._names.setdefault(place_of(parameter), []).extend((name, parameter) for name in own[parameter])

    @property
    def places(self) -> Collection[Place]:
        return self._names

    def model(self, from_b: Collection[Place]) -> Model:
        """The graft of these places of b onto a."""
        mixed = copy.copy(self._checkpoints[0])
        mixed.tensors = dict(mixed.tensors)
        for place in from_b:
            for name, _ in self._names[place]:
                mixed.tensors[name] = self._checkpoints[1].tensors[name]
        return build_model(self._class, self.cfg, self._checkpoints[0].directory, mixed, self._device, self._stream)

    def _tensors_by_parameter(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        skeleton = self._class(self.cfg.replace(device=torch.device("meta")))
        plan = plan_copies(skeleton, conversion_for(self.cfg.model_type, str(checkpoint.directory)), checkpoint)
        by_parameter: dict[str, list[str]] = {name: [] for name, _ in skeleton.named_parameters()}
        for name, slot in plan.copied.items():
            by_parameter[slot.parameter].append(name)
        for name, slot in plan.repeated.items():  # a tied unembedding goes where the embedding goes
            by_parameter["embed.W_E" if slot.parameter == "unembed.W_U" else slot.parameter].append(name)
        return by_parameter


def graft_checkpoints(
    model_class: type[Model],
    a: str | PathLike[str],
    b: str | PathLike[str],
    layers: Layers = "all",
    parts: Parts = tuple(BLOCK_PARTS),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    stream: bool = False,
) -> Model:
    """`hooked_moe.surgery.graft` of two checkpoint directories, read from the files of both: never two models in memory.

    >>> from hooked_moe import HookedMoE
    >>> from hooked_moe.loading.registry import locate
    >>> directory = locate("tiny-olmoe").directory
    >>> graft_checkpoints(HookedMoE, directory, directory, layers={5}, parts=["router"], stream=True).streams
    True
    """
    grafts = CheckpointGrafts(model_class, a, b, dtype=dtype, device=device, stream=stream)
    return grafts.model(default_places(grafts.places, layers, parts))
