"""Where each tensor of a checkpoint lives in the model: one table per family, read in both directions.

Every checkpoint tensor is a view of one parameter, or of one index into it (an expert, or its gate or up projection). Loading
and saving are then plain copies, hence bit-exact. A parameter that would need arithmetic or a transposition to become a
checkpoint tensor is kept in the checkpoint's orientation by the model instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
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
    when: Callable[[HookedMoEConfig], bool] = lambda cfg: True
    """For which configs, where the same parameter has another name in others."""

    def slots(self, cfg: HookedMoEConfig) -> Iterator[Slot]:
        """Every tensor of this row in a model of this configuration."""
        for layer in range(cfg.n_layers) if "{layer}" in self.hf else (0,):
            for expert in range(cfg.experts_in(layer)) if "{expert}" in self.hf else (0,):
                hf, ours = (name.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for name in (self.hf, self.ours))
                parameter, _, index = ours.rstrip("]").partition("[")
                yield Slot(hf, parameter, tuple(int(i) for i in index.split(",") if i), self.axes)


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint and its place in the model."""

    hf_name: str
    parameter: str
    index: tuple[int, ...]
    axes: str

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this tensor is, in the checkpoint's shape: always a view."""
        part = parameter[self.index] if self.index else parameter
        sizes, shape = iter(part.shape), []
        for group in re.findall(r"\([^)]*\)|[^\s()]+", self.axes):
            shape.append(math.prod(next(sizes) for _ in group.strip("()").split()))
        return part.view(shape)


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
