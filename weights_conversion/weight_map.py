"""Where each tensor of a checkpoint lives in the model: one table per family, read in both directions.

Every checkpoint tensor is a view of one parameter, or of one index into it (an expert, or its gate or up projection), at most
with its axes in another order. Loading and saving are then plain copies, hence bit-exact. A parameter that would need arithmetic
to become a checkpoint tensor is kept as the checkpoint has it by the model instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hooked_moe.config import HookedMoEConfig


@dataclass(frozen=True)
class Weight:
    """One row of a weight map. `{layer}` and `{expert}` stand for every layer and expert.

    `axes` names the axes of the checkpoint's tensor; those in parentheses are one axis there and several in the model:
    `Weight("{layer}.q_proj.weight", "blocks.{layer}.attn.W_Q", "(head d_head) d_model")`. `ours` may end in an index, as in
    `experts.W_in[{expert}, 0]`.
    """

    hf: str
    ours: str
    axes: str
    our_axes: str | None = None
    """The axes of ours by the same names, where their order is another."""
    when: Callable[[HookedMoEConfig], bool] = lambda cfg: True
    """For which configs, where the same parameter has another name in others."""

    def slots(self, cfg: HookedMoEConfig) -> Iterator[Slot]:
        """Every tensor of this row in a model of this configuration."""
        for layer in range(cfg.n_layers) if "{layer}" in self.hf else (0,):
            for expert in range(cfg.experts_in(layer)) if "{expert}" in self.hf else (0,):
                hf, ours = (name.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for name in (self.hf, self.ours))
                parameter, _, index = ours.rstrip("]").partition("[")
                yield Slot(hf, parameter, tuple(int(i) for i in index.split(",") if i), self.axes, self.our_axes)


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint and its place in the model."""

    hf_name: str
    parameter: str
    index: tuple[int, ...]
    axes: str
    our_axes: str | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this tensor is: always a view. It has the checkpoint's shape; where the order of axes is
        another, the axes in parentheses are still apart."""
        part = parameter[self.index] if self.index else parameter
        if self.our_axes is None:
            return part.view(self._merged(part.shape))
        ours = self.our_axes.split()
        return part.permute([ours.index(axis) for axis in re.findall(r"[^\s()]+", self.axes)])

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The checkpoint's shape."""
        return self._merged(self.of(parameter).shape) if self.our_axes is not None else tuple(self.of(parameter).shape)

    def as_stored(self, parameter: Tensor) -> Tensor:
        """The tensor of the checkpoint: a view where memory is in its order, or else a copy."""
        return self.of(parameter).reshape(self.shape(parameter)).contiguous()

    def _merged(self, sizes: Sequence[int]) -> tuple[int, ...]:
        each = iter(sizes)
        groups = re.findall(r"\([^)]*\)|[^\s()]+", self.axes)
        return tuple(math.prod(next(each) for _ in group.strip("()").split()) for group in groups)


def slots_by_parameter(
    weights: tuple[Weight, ...], cfg: HookedMoEConfig, parameters: Mapping[str, Tensor]
) -> dict[str, list[Slot]]:
    """For each parameter of a model, the checkpoint tensors that it is made of, in the order of the table."""
    by_parameter: dict[str, list[Slot]] = {}
    for weight in (weight for weight in weights if weight.when(cfg)):
        for slot in weight.slots(cfg):
            if slot.parameter in parameters:
                by_parameter.setdefault(slot.parameter, []).append(slot)
    return by_parameter


def left_out(names: Collection[str], cfg: HookedMoEConfig) -> set[str]:
    """Tensors of a checkpoint that no model here has a place for, and that may be in one all the same.

    They are the layers for multi-token prediction of DeepSeek-V3 and GLM (arXiv 2412.19437, section 2.2), which stand after all
    others and each have a projection `eh_proj`, and rotary frequencies, which follow from the config.
    """
    found = set()
    for name in names:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        predicts_more = layer and int(layer[1]) >= cfg.n_layers and f"model.layers.{layer[1]}.eh_proj.weight" in names
        if predicts_more or name.endswith(".rotary_emb.inv_freq"):
            found.add(name)
    return found
