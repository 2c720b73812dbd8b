"""Results of patches and attributions: a value for every expert of every token, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.counterfactuals.results import BATCH, LAYER, POS, TensorResult
from hooked_moe.tables import Axis, Column

_PER_SLOT = "layer batch pos slot"


@dataclass(frozen=True, repr=False)
class ExpertPatches(TensorResult):
    """What each expert of a token does to a metric when its part of the clean run is put into the corrupted one.

    Slots are the experts that either run routes the token to: the clean run's by weight, then those of the corrupted run alone.
    `expert_index` is -1 where there is none. Values are nan where nothing was measured.
    """

    layers: list[int]
    """The model's layer of each entry of the `layer` axis."""
    values: Float[Tensor, "layer batch pos slot"]
    """The metric with the patch minus that of the corrupted run: measured, or estimated by the `method`."""
    expert_index: Int[Tensor, "layer batch pos slot"]
    clean_active: Bool[Tensor, "layer batch pos slot"]
    """Whether the clean run routes the token to the expert."""
    corrupt_active: Bool[Tensor, "layer batch pos slot"]
    total: Float[Tensor, "batch pos"]
    """The metric of the clean run minus that of the corrupted one."""
    num_experts: int
    metric: str
    part: str
    method: str

    AXES: ClassVar = {
        "layer": LAYER,
        "batch": BATCH,
        "pos": POS,
        "slot": Axis("place among the experts that the clean or the corrupted run routes the token to"),
    }
    PRESENT: ClassVar = "expert_index"
    COLUMNS: ClassVar = {
        "expert_index": Column(_PER_SLOT, "index", "expert; -1 where there is none"),
        "values": Column(_PER_SLOT, "metric", "metric with the expert's part of the clean run minus that without it"),
        "clean_active": Column(_PER_SLOT, "1", "whether the clean run routes the token to the expert"),
        "corrupt_active": Column(_PER_SLOT, "1", "whether the corrupted run routes the token to the expert"),
        "total": Column("batch pos", "metric", "metric of the clean run minus that of the corrupted run"),
    }

    def attributes(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("num_experts", "metric", "part", "method")}
        return super().attributes() | own

    def summary(self) -> str:
        return f"{self.method}, {self.part}, {self.metric}: {super().summary()}"

    def dense(self) -> Float[Tensor, "layer batch pos expert"]:
        """The values by expert: 0 where neither run routes the token to it, since then there is nothing to patch."""
        shape = (*self.values.shape[:-1], self.num_experts + 1)  # one more, for slots without an expert
        index = torch.where(self.expert_index < 0, self.num_experts, self.expert_index)
        values = torch.where(self.expert_index < 0, 0.0, self.values)
        dense = torch.zeros(shape, dtype=values.dtype, device=values.device).scatter_add(-1, index, values)[..., :-1]
        unmeasured = (self.values.isnan() | (self.expert_index < 0)).all(-1, keepdim=True)
        return dense.masked_fill(unmeasured, float("nan"))

    def restored(self) -> Float[Tensor, "layer batch pos slot"]:
        """The values as a share of `total`: 1 restores the clean run's metric. Rows without a difference give inf or nan."""
        return self.values / self.total[..., None]

    def bootstrap_ci(
        self, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer pos expert"], Float[Tensor, "layer pos expert"]]:
        """Low and high ends of the percentile bootstrap interval of each expert's mean value over batch rows.

        A row that routes the token to the expert in neither run counts as 0. nan where a row was not measured.
        """
        return bootstrap_ci(self.dense().movedim(1, 0), confidence=confidence, n_resamples=n_resamples, seed=seed)


@dataclass(frozen=True, repr=False)
class TokenPatches(TensorResult):
    """What the clean run's routing of each token does to a metric of the corrupted run."""

    layers: list[int]
    values: Float[Tensor, "layer batch pos"]
    """The metric with the patch minus that of the corrupted run."""
    total: Float[Tensor, "batch pos"]
    """The metric of the clean run minus that of the corrupted one."""
    metric: str
    part: str

    AXES: ClassVar = {"layer": LAYER, "batch": BATCH, "pos": POS}
    COLUMNS: ClassVar = {
        "values": Column("layer batch pos", "metric", "metric with the clean run's routing minus that without it"),
        "total": ExpertPatches.COLUMNS["total"],
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"metric": self.metric, "part": self.part}

    def restored(self) -> Float[Tensor, "layer batch pos"]:
        """The values as a share of `total`."""
        return self.values / self.total

    def bootstrap_ci(
        self, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer pos"], Float[Tensor, "layer pos"]]:
        """Low and high ends of the percentile bootstrap interval of the mean over batch rows."""
        return bootstrap_ci(self.values.movedim(1, 0), confidence=confidence, n_resamples=n_resamples, seed=seed)


def bootstrap_ci(
    values: Float[Tensor, "row *cell"], *, confidence: float, n_resamples: int, seed: int
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """The percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13) of the mean of every cell."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence!r}")
    rows, cells = len(values), values.flatten(1).cpu().double()
    drawn = torch.randint(0, rows, (n_resamples, rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    counts = torch.zeros(n_resamples, rows, dtype=torch.float64, device="cpu").scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    measured = cells.isfinite().all(0)
    ends = torch.full((2, cells.shape[1]), float("nan"), dtype=torch.float64, device="cpu")
    tail = (1 - confidence) / 2
    for own in measured.nonzero()[:, 0].split(4096):
        means = (counts @ cells[:, own]) / rows
        ends[:, own] = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu"), dim=0)
    low, high = ends.to(values).unflatten(1, values.shape[1:])
    return low, high


@dataclass(frozen=True, repr=False)
class RouterAttribution(TensorResult):
    """What router logits do to a metric: by their slopes, and across the boundary of selection."""

    layers: list[int]
    soft: Float[Tensor, "layer batch pos expert"]
    """d metric / d (router logit) times the clean run's logit minus the corrupted run's, the selection held fixed."""
    hard: Float[Tensor, "layer batch pos"]
    """The metric with the next-ranked expert in the slot of the last, minus that of the corrupted run."""
    total: Float[Tensor, "batch pos"]
    metric: str

    AXES: ClassVar = {"layer": LAYER, "batch": BATCH, "pos": POS, "expert": Axis("routed expert")}
    COLUMNS: ClassVar = {
        "soft": Column("layer batch pos expert", "metric", "slope along the router logit times its change"),
        "hard": Column("layer batch pos", "metric", "exact effect of the next-ranked expert in the slot of the last"),
        "total": ExpertPatches.COLUMNS["total"],
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"metric": self.metric}
