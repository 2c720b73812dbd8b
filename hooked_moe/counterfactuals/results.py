"""The table of what removals did: one value per (layer, batch, pos, slot)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.engine.padding import Results


@dataclass(frozen=True)
class ExpertEffects:
    """Observations of the clean run and the effect of each removal, for every active expert.

    Slot j of a position is its j-th expert by routing weight. Values are nan (`expert_index` -1) where there is no token, and
    `delta_loss` also where the position was not asked for or has no next token.
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

    def at(self, layer: int, batch: int, pos: int, expert: int) -> dict[str, int | float]:
        """Every value of one expert at one token. Raises `ValueError` if it was not measured there."""
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
        values = {name: float(getattr(self, name)[slot]) for name in PER_SLOT if name != "expert_index"}
        return {"slot": slot[-1], **values, "baseline_loss": float(self.baseline_loss[batch, pos])}


_OTHERS = ("layers", "router_probability", "baseline_loss", "readouts", "kl_clamped")
PER_SLOT = [column.name for column in fields(ExpertEffects) if column.name not in _OTHERS]


@dataclass(frozen=True)
class VariantEffects:
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
