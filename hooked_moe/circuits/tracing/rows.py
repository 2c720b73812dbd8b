"""What came of a batch as plain numbers, one row for each value of a table: the vectors of its patches need not be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.batches import CorruptedRun
from hooked_moe.circuits.tracing.measure import Measured
from hooked_moe.circuits.tracing.patches import PARTS, SITES, slots_of


@dataclass(frozen=True)
class BatchRows:
    """The numbers of one batch."""

    runs: Sequence[CorruptedRun]
    margins: Float[np.ndarray, "run 2"]
    """Of the clean and of the corrupted run."""
    rank_clean: Float[np.ndarray, " run"]
    sink: Sequence[bool]
    spots: Int[np.ndarray, "spot 2"]
    """The case and the position of each."""
    places: Sequence[str]
    sites: Float[np.ndarray, "spot layer site reading"]
    all_moe: Float[np.ndarray, "spot reading"]
    expert_keys: Int[np.ndarray, "row 4"]
    """(case, position, layer, expert)."""
    expert_values: dict[str, np.ndarray]


def batch_rows(part: Measured) -> BatchRows:
    """The numbers of all that was measured of a batch."""
    cases = np.array([run.case for run in part.batch.runs])[_numpy(part.batch.spots.row)]
    spots = np.stack([cases, _numpy(part.batch.spots.pos)], axis=1)
    keys, values = _of_experts(part, spots)
    return BatchRows(
        runs=part.batch.runs,
        margins=np.stack([_numpy(part.margin_clean), _numpy(part.margin_corrupt)], axis=1),
        rank_clean=_numpy(part.rank_clean),
        sink=_numpy(part.clean.sink).tolist(),
        spots=spots,
        places=part.batch.spots.places,
        sites=_numpy(part.rescue[:, : len(SITES)]).transpose(2, 0, 1, 3),
        all_moe=_numpy(part.all_moe),
        expert_keys=keys,
        expert_values=values,
    )


def _of_experts(part: Measured, spots: Int[np.ndarray, "spot 2"]) -> tuple[Int[np.ndarray, "row 4"], dict[str, np.ndarray]]:
    """(case, position, layer, expert) and the values of every expert that either run goes to, at every spot."""
    n_clean = part.direct.shape[1] // 2
    rescue = _numpy(part.rescue)
    keys: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {}
    for layer, patches in enumerate(part.patches):
        experts = patches.experts
        if experts is None:
            continue
        whole = rescue[layer][slots_of("whole", n_clean)].transpose(1, 0, 2)  # spot, slot, reading
        own = {
            "clean_active": _numpy(experts.clean_active).astype(float),
            "corrupt_active": _numpy(experts.corrupt_active).astype(float),
            "weight_clean": _numpy(experts.weight_clean),
            "weight_corrupt": _numpy(experts.weight_corrupt),
            "norm_delta": _numpy(experts.whole.norm(dim=-1)),
            "rescue": whole,
            **{name: _numpy(getattr(part, name)[layer].T) for name in ("direct", "first_order", "necessity")},
        }
        for name in PARTS:
            of_clean = rescue[layer][slots_of(name, n_clean)][..., 0].T
            if name.endswith("equal_norm") and n_clean == 1:
                of_clean = np.full_like(of_clean, np.nan)
            own[name] = np.concatenate([of_clean, _where_corrupted_only(name, whole[:, n_clean:, 0])], axis=1)
        rows, slots = (_numpy(experts.indices) >= 0).nonzero()
        place = [spots[rows], np.full((len(rows), 1), layer), _numpy(experts.indices)[rows, slots, None]]
        keys.append(np.concatenate(place, axis=1))
        for name, value in own.items():
            values.setdefault(name, []).append(value[rows, slots])
    return np.concatenate(keys), {name: np.concatenate(columns) for name, columns in values.items()}


def _where_corrupted_only(part: str, whole: Float[np.ndarray, "spot slot"]) -> Float[np.ndarray, "spot slot"]:
    """Of experts that only the corrupted run goes to: all of the patch is the routing's, and no control is made."""
    if part == "rescue_routing":
        return whole
    return np.full_like(whole, 0.0 if part == "rescue_content" else np.nan)


def _numpy(x: Tensor) -> Any:
    return x.detach().cpu().double().numpy() if x.is_floating_point() else x.cpu().numpy()
