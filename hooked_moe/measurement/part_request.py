"""What is asked of a part of a run: checked, and put together with what the part has already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hooked_moe.checks import whole_number, whole_numbers
from hooked_moe.counterfactuals import Order
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.draw import Draw
from hooked_moe.measurement.part_spec import BUDGETED_PARTS, Part, PartSpec, ProductsName, checked_positions, positions_sha256
from hooked_moe.measurement.tokenized_corpus import DocumentPositions, TokenizedCorpus
from hooked_moe.tables import REMOVAL_ORDERS, parquet_batches

_EFFECT_TABLES: dict[Part, str] = {"position": "effects", "sequence": "effects_sequence", "progressive": "progressive"}
"""The table of each part that has a row for every removal, of those that can be restricted to some positions."""


@dataclass(frozen=True)
class PartRequest:
    """What a run is asked to measure, as it is given."""

    part: Part
    positions: Iterable[tuple[int, int]] | None = None
    layers: Iterable[int] | None = None
    orders: Iterable[Order] = REMOVAL_ORDERS
    seed: int = 0

    def check_part(self, budgeted: bool) -> None:
        """Raises `ValueError` for a part that a run with a budget, or without one, does not have."""
        if self.part not in TABLES:
            raise ValueError(f"part must be one of {', '.join(map(repr, TABLES))}, not {self.part!r}")
        if (self.part in BUDGETED_PARTS) != budgeted:
            raise ValueError(
                f"part {self.part!r} is of a run {'without' if budgeted else 'with'} a budget: open_measurement(..., "
                f"{'budget=None' if budgeted else 'budget=Budget(share=0.01)'}), which has a directory of its own"
            )
        if budgeted and self.positions is not None:
            raise ValueError("a budgeted run draws from the removals at all positions: leave out positions")

    def spec(
        self,
        tokenized: TokenizedCorpus,
        layers: tuple[int, ...],
        removal: RemovalName,
        n_layers: int,
        products: ProductsName | None = None,
    ) -> PartSpec:
        """The part of a run over these layers, of the model's `n_layers`. Raises `ValueError` for what the run does not have."""
        chosen = checked_positions(self.positions, tokenized)
        if self.part != "progressive":
            return PartSpec(self.part, layers, removal, chosen, products=products if self.part == "position" else None)
        asked = tuple(self.orders)
        if not asked or not set(asked) <= set(REMOVAL_ORDERS):
            raise ValueError(f"orders must be some of {REMOVAL_ORDERS}, not {asked}")
        own = layers if self.layers is None else tuple(sorted(set(whole_numbers(self.layers, "layers", n_layers))))
        outside = [layer for layer in own if layer not in layers]
        if outside or not own:
            raise ValueError(f"layers {outside} are not of this run, which measures {list(layers)}")
        return PartSpec(self.part, own, removal, chosen, _in_order(asked), whole_number(self.seed, "seed"))


def sampled_spec(draw: Draw, layers: tuple[int, ...], removal: RemovalName, products: ProductsName | None = None) -> PartSpec:
    """The part of the removals that were drawn."""
    return PartSpec("sampled", layers, removal, seed=draw.seed, draw=draw, products=products)


def with_measured(
    spec: PartSpec,
    recorded: Mapping[str, Any] | None,
    directory: Path,
    tokenized: TokenizedCorpus,
    log: Callable[[str], object],
) -> PartSpec:
    """What is asked of a part together with what it has by the manifest's record; None where it has nothing.

    Raises `ValueError` for another seed than the part's.
    """
    if recorded is None:
        return spec
    if recorded.get("seed", spec.seed) != spec.seed:
        raise ValueError(
            f"{directory} has random orders of seed {recorded['seed']}, not {spec.seed}: give another name to the run"
        )
    positions = spec.positions
    if recorded["positions"] == "all":
        positions = None
    elif positions is not None and positions_sha256(positions) != recorded["positions_sha256"]:
        effects = directory / f"{_EFFECT_TABLES[spec.part]}.parquet"
        if effects.is_file():
            positions = checked_positions(positions | measured_positions(effects), tokenized)
        else:
            log(f"note: with {effects.name} is lost which positions it had: only those that are asked for now are measured")
    return dataclasses.replace(
        spec,
        positions=positions,
        layers=tuple(sorted({*spec.layers, *recorded["layers"]})),
        orders=_in_order((*spec.orders, *recorded.get("orders", ()))),
    )


def measured_positions(effects: Path) -> DocumentPositions:
    """The (document, position) pairs whose removals an effect table has."""
    positions: set[tuple[int, int]] = set()
    columns = ["document", "position", "delta_loss"]
    for batch in parquet_batches(effects, columns, 1 << 18):
        measured = ~np.isnan(batch["delta_loss"].to_numpy(zero_copy_only=False))
        pairs = (batch[name].to_numpy()[measured] for name in ("document", "position"))
        positions.update(map(tuple, np.unique(np.stack(list(pairs), axis=1), axis=0).tolist()))
    return frozenset(positions)


def _in_order(orders: Collection[Order]) -> tuple[Order, ...]:
    """Some orders of removal, each once, in the sequence of `REMOVAL_ORDERS`."""
    return tuple(order for order in REMOVAL_ORDERS if order in orders)
