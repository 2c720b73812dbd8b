"""The table of what removals did: one value per (layer, batch, pos, slot)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.checks import whole_number
from hooked_moe.counterfactuals.engine.padding import Results
from hooked_moe.tables import Axis, Column, GridResult

LAYER = Axis("transformer block, counted from 0", labels="layers")
BATCH = Axis("row of the tokens given, counted from 0")
POS = Axis("token position in that row, counted from 0")
SLOT = Axis("rank of the expert among the active ones; 0 has the highest routing weight")
VARIANT = Axis("number of the change, in the order they were given")


T = TypeVar("T", bound="TensorResult")


_READOUTS = "readouts/"
"""What the columns of readouts begin with."""


class TensorResult(GridResult):
    """A `GridResult` whose arrays are tensors. What `load` gives is on the CPU."""

    def array(self, name: str) -> np.ndarray:
        tensor: Tensor = getattr(self, name).detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16

    @classmethod
    def from_arrays(cls: type[T], arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> T:
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()}, **attributes)


class EffectsResult(TensorResult):
    """What results of counterfactuals share: further readouts, and the count of KL divergences that rounding put below zero."""

    layers: list[int]
    readouts: dict[str, Tensor]
    kl_clamped: int

    def columns(self) -> Mapping[str, Column]:
        rows = " ".join(self.AXES)
        unit, meaning = "readout", "as the readout of this name says"
        readouts = {
            f"{_READOUTS}{name}": Column(f"{rows} {' '.join(_rest_axes(name, len(self.AXES), table))}", unit, meaning)
            for name, table in self.readouts.items()
        }
        return {**self.COLUMNS, **readouts}

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"kl_clamped": self.kl_clamped}

    def array(self, name: str) -> np.ndarray:
        if name.startswith(_READOUTS):
            return self.readouts[name.removeprefix(_READOUTS)].detach().cpu().numpy()
        return super().array(name)

    @classmethod
    def from_arrays(cls: type[T], arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> T:
        readouts = {name.removeprefix(_READOUTS): torch.from_numpy(arrays[name]) for name in arrays if name.startswith(_READOUTS)}
        own = {name: array for name, array in arrays.items() if not name.startswith(_READOUTS)}
        return super().from_arrays(own, {**attributes, "readouts": readouts})


def _rest_axes(name: str, rows: int, table: Tensor) -> list[str]:
    return [f"{name}.{axis}" for axis in range(table.dim() - rows)]


def _per_slot(unit: str, meaning: str) -> Column:
    return Column("layer batch pos slot", unit, meaning)


@dataclass(frozen=True, repr=False)
class ExpertEffects(EffectsResult):
    """Observations of the clean run and the effect of each removal, for every active expert.

    Slot j of a position is its j-th expert by routing weight. Values are nan (`expert_index` -1) where there is no token, and
    `delta_loss` also where the removal was not asked for or has no next token.
    """

    layers: list[int]
    """The model's layer of each entry of the `layer` axis."""
    delta_loss: Float[Tensor, "layer batch pos slot"]
    """Loss at the position with the removal minus without, in nats (delta_i(t), arXiv 2606.10703)."""
    kl: Float[Tensor, "layer batch pos slot"]
    """KL(clean || changed) of the prediction at the position, in nats: what `delta_loss` is on average over next tokens that are
    drawn from the clean run. Never negative, so it says how much the prediction changes, not whether it gets better."""
    expert_index: Int[Tensor, "layer batch pos slot"]
    routing_weight: Float[Tensor, "layer batch pos slot"]
    """g_i: the weight as applied, after renormalisation and scaling."""
    gap_norm: Float[Tensor, "layer batch pos slot"]
    """g_i ||E_i(x)||: how far the removal moves the block's output."""
    output_norm: Float[Tensor, "layer batch pos slot"]
    """||E_i(x)||."""
    rest_cosine: Float[Tensor, "layer batch pos slot"]
    """Cosine between the expert's contribution and the rest of the routed sum; 0 where either is zero."""
    rest_norm: Float[Tensor, "layer batch pos slot"]
    """Euclidean norm of the rest of the routed sum."""
    max_activation: Float[Tensor, "layer batch pos slot"]
    """Largest |coordinate| of E_i(x)."""
    router_probability: Float[Tensor, "layer batch pos expert"]
    """The router's score of every expert, selected or not: its softmax, or its sigmoids, without a selection bias; 0 for experts
    that a layer does not have."""
    baseline_loss: Float[Tensor, "batch pos"]
    """-log p(next token) of the clean run, in nats; nan where there is no next token."""
    readouts: dict[str, Float[Tensor, "layer batch pos slot *rest"]] = field(default_factory=dict)
    """What was asked for besides the loss, by the readout's name."""
    kl_clamped: int = 0
    """How many values of `kl` rounding had put below zero: they are zero."""

    AXES: ClassVar = {"layer": LAYER, "batch": BATCH, "pos": POS, "slot": SLOT}
    PRESENT: ClassVar = "expert_index"
    COLUMNS: ClassVar = {
        "expert_index": _per_slot("index", "routed expert; -1 where there is no token"),
        "delta_loss": _per_slot(
            "nats", "loss with the removal minus loss without; above 0 where the expert helps; NaN if not measured"
        ),
        "kl": _per_slot("nats", "KL(clean || changed) of the prediction at the position; NaN if not measured"),
        "routing_weight": _per_slot("1", "weight as applied, after renormalisation and scaling"),
        "gap_norm": _per_slot("residual stream", "g ||E(x)||, how far the removal moves the block's output"),
        "output_norm": _per_slot("residual stream", "||E(x)||"),
        "rest_cosine": _per_slot(
            "1", "cosine between the expert's contribution and the rest of the routed sum; 0 where either is zero"
        ),
        "rest_norm": _per_slot("residual stream", "Euclidean norm of the rest of the routed sum"),
        "max_activation": _per_slot("residual stream", "largest |coordinate| of E(x)"),
        "baseline_loss": Column("batch pos", "nats", "-log p(next token) of the clean run; NaN where there is none"),
        "router_probability": Column("layer batch pos expert", "1", "the router's softmax over all experts"),
    }

    def at(self, layer: int, batch: int, pos: int, expert: int) -> dict[str, int | float]:
        """Every value of one expert at one token. Raises `ValueError` if it was not measured there."""
        given = {"layer": layer, "batch": batch, "pos": pos, "expert": expert}
        layer, batch, pos, expert = (whole_number(value, name) for name, value in given.items())
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not measured; measured layers are {self.layers}")
        batches, length = self.baseline_loss.shape
        if not (0 <= batch < batches and 0 <= pos < length):
            raise ValueError(f"(batch, pos) = ({batch}, {pos}) is out of range: this table has {batches} x {length} tokens")
        where = (self.layers.index(layer), batch, pos)
        n_experts = self.router_probability.shape[-1]
        if not 0 <= expert < n_experts:
            raise ValueError(f"expert {expert} is out of range: layers have experts 0 to {n_experts - 1}")
        routed = self.expert_index[where].tolist()
        if -1 in routed:
            raise ValueError(f"there is no token at batch {batch}, pos {pos}: it is padding")
        if bool(self.delta_loss[where].isnan().all()):
            raise ValueError(
                f"effects were not measured at layer {layer}, batch {batch}, pos {pos}: the position was not asked for, "
                "or has no next token"
            )
        if expert not in routed:
            raise ValueError(
                f"expert {expert} is not routed at layer {layer}, batch {batch}, pos {pos}: the router chose {routed}; "
                "removing any other expert has an effect of exactly 0"
            )
        slot = (*where, routed.index(expert))
        if bool(self.delta_loss[slot].isnan()):
            raise ValueError(
                f"expert {expert} was not removed at layer {layer}, batch {batch}, pos {pos}: it was not among the picks"
            )
        values = {name: float(getattr(self, name)[slot]) for name in PER_SLOT if name != "expert_index"}
        return {"slot": slot[-1], **values, "baseline_loss": float(self.baseline_loss[batch, pos])}


PER_SLOT = [name for name, column in ExpertEffects.COLUMNS.items() if column.axes == "layer batch pos slot"]


@dataclass(frozen=True, repr=False)
class VariantEffects(EffectsResult):
    """The effects of any changes at single tokens: `variant` numbers them as they were given."""

    layers: list[int]
    """The model's layer of each entry of the `layer` axis."""
    delta_loss: Float[Tensor, "layer variant batch pos"]
    """Loss at the position with the change minus without, in nats; nan where it was not measured."""
    kl: Float[Tensor, "layer variant batch pos"]
    """KL(clean || changed) of the prediction at the position, in nats; as in `ExpertEffects`."""
    baseline_loss: Float[Tensor, "batch pos"]
    readouts: dict[str, Float[Tensor, "layer variant batch pos *rest"]] = field(default_factory=dict)
    kl_clamped: int = 0
    """How many values of `kl` rounding had put below zero: they are zero."""

    AXES: ClassVar = {"layer": LAYER, "variant": VARIANT, "batch": BATCH, "pos": POS}
    COLUMNS: ClassVar = {
        "delta_loss": Column("layer variant batch pos", "nats", "loss with the change minus loss without; NaN if not measured"),
        "kl": Column("layer variant batch pos", "nats", "KL(clean || changed) of the prediction; NaN if not measured"),
        "baseline_loss": ExpertEffects.COLUMNS["baseline_loss"],
    }


def _readouts(results: Results) -> dict[str, Tensor]:
    prefix = "readouts/"
    return {name.removeprefix(prefix): table for name, table in results.tables.items() if name.startswith(prefix)}


def as_expert_effects(results: Results) -> ExpertEffects:
    """The engine's tables as the table of experts."""
    columns = {name: results.tables[name] for name in (*PER_SLOT, "router_probability")}
    return ExpertEffects(
        layers=results.layers,
        baseline_loss=results.baseline,
        readouts=_readouts(results),
        kl_clamped=results.kl_clamped,
        **columns,
    )


def as_variant_effects(results: Results) -> VariantEffects:
    """The engine's tables as the table of variants, numbered right after the layer."""

    def variants_second(table: Tensor) -> Tensor:
        return table.movedim(3, 1)

    return VariantEffects(
        layers=results.layers,
        delta_loss=variants_second(results.tables["delta_loss"]),
        kl=variants_second(results.tables["kl"]),
        baseline_loss=results.baseline,
        readouts={name: variants_second(table) for name, table in _readouts(results).items()},
        kl_clamped=results.kl_clamped,
    )
