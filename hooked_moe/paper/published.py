"""The published numbers of arXiv 2606.10703, and what its released results hold beside them.

    published_values()       every number of Tables 1-9 and of Figures 1-2, as printed: one record each
    released_comparisons()   the 4,000 pairs of removals behind Table 1, or those behind Table 3

Nothing here is tuned to or computed by this project; the files in `data/` name their sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

METRICS = ("utilization_rate", "activation_norm", "mean_routing_weight_when_active", "activation_std")
"""The four observational metrics of the paper, in the order in which its code drew positions for them."""
CONTROL_RANKING = "routing_weight"
"""The ranking of the control: by the token's own routing weights, not by a metric of the expert."""
PAIRS = 200
"""Positions behind every cell of Tables 1-6."""


@dataclass(frozen=True)
class PublishedModel:
    name: str
    """The short name that `HookedMoE.from_pretrained` takes."""
    model_type: str
    n_layers: int
    layers: tuple[int, ...]
    """The layers of the audit and of the control."""


MODELS = (
    PublishedModel("olmoe", "olmoe", 16, (0, 4, 7, 11, 15)),
    PublishedModel("qwen1.5-moe", "qwen2_moe", 24, (0, 6, 12, 18, 23)),
    PublishedModel("deepseek-v2-lite", "deepseek_v2", 27, (1, 7, 13, 20, 26)),
)


@dataclass(frozen=True)
class PublishedValue:
    """One printed number."""

    table: str
    """As in "Table 4" or "Figure 2"."""
    model: str
    layer: int
    ranking: str
    """What ranks the experts in Tables 1-6, the order of removal in Tables 8-9; empty in redistribution."""
    removed: int
    """How many experts are removed at once; 0 in redistribution, which removes none."""
    statistic: str
    """d, p_t, p_wilcoxon, rho (Spearman of weight ratio and difference), mean, median, p95, mean_gap_norm, ..."""
    value: float


_CELL_TABLES = {
    "table1_olmoe_audit": ("Table 1", "olmoe"),
    "table2_qwen_audit": ("Table 2", "qwen1.5-moe"),
    "table3_deepseek_audit": ("Table 3", "deepseek-v2-lite"),
    "table4_olmoe_control": ("Table 4", "olmoe"),
    "table5_qwen_control": ("Table 5", "qwen1.5-moe"),
    "table6_deepseek_control": ("Table 6", "deepseek-v2-lite"),
}
_STATISTICS = {"d": "d", "p_t": "p_t", "p_w": "p_wilcoxon", "rho": "rho"}


def published_model(model_type: str) -> PublishedModel | None:
    """The audited model of a family; None where the paper has none of it."""
    return next((model for model in MODELS if model.model_type == model_type), None)


def published_values() -> list[PublishedValue]:
    """Every printed number. Figure 1 shows the d of Tables 1-6 and therefore adds none."""
    tables, released = _read("published_tables.json"), _read("released_results.json")
    return [*_cells(tables), *_redistribution(tables, released), *_progressive(tables)]


def released_wilcoxon(metric: str, layer: int) -> float:
    """Wilcoxon's p of a cell of Table 2, which prints only the t-test's: from the released results."""
    return float(_read("released_results.json")["qwen_audit_p_wilcoxon"][metric][str(layer)])


def released_mean_routing_weight(layer: int) -> float:
    """Mean routing weight of OLMoE's experts in a layer, as the released redistribution results give it."""
    return float(_read("released_results.json")["figure2_olmoe_redistribution"][str(layer)]["mean_routing_weight"])


_COMPARISONS = {"olmoe": "olmoe_audit_comparisons.parquet", "deepseek-v2-lite": "deepseek_audit_comparisons.parquet"}


def released_comparisons(model: str = "olmoe") -> pa.Table:
    """A model's audit as released: 20 cells of 200 positions, a row each, in the order drawn. Columns carry their meaning.

    Raises `ValueError` for a model whose comparisons were not released.
    """
    if model not in _COMPARISONS:
        raise ValueError(f"the comparisons of {model!r} were not released; those of {' and '.join(_COMPARISONS)} were")
    with resources.files("hooked_moe.paper").joinpath("data", _COMPARISONS[model]).open("rb") as file:
        return pq.read_table(file)


def _read(name: str) -> Any:
    return json.loads(resources.files("hooked_moe.paper").joinpath("data", name).read_text(encoding="utf-8"))


def _cells(tables: Any) -> Iterator[PublishedValue]:
    for key, (table, model) in _CELL_TABLES.items():
        rankings = tables[key] if key.endswith("audit") else {CONTROL_RANKING: tables[key]}
        for ranking, layers in rankings.items():
            for layer, row in layers.items():
                for printed, value in row.items():
                    yield PublishedValue(table, model, int(layer), ranking, 1, _STATISTICS[printed], float(value))


def _redistribution(tables: Any, released: Any) -> Iterator[PublishedValue]:
    for layer, row in tables["table7_qwen_redistribution"].items():
        for statistic, value in row.items():
            yield PublishedValue("Table 7", "qwen1.5-moe", int(layer), "", 0, statistic, float(value))
    for layer, row in released["figure2_olmoe_redistribution"].items():
        for statistic in ("mean_gap_norm", "rho_weight_gap", "rho_gap_compensation"):
            yield PublishedValue("Figure 2", "olmoe", int(layer), "", 0, statistic, float(row[statistic]))


def _progressive(tables: Any) -> Iterator[PublishedValue]:
    for layer, means in tables["table8_olmoe_progressive_mean"].items():
        for removed, value in means.items():
            yield PublishedValue("Table 8", "olmoe", int(layer), "descending", int(removed), "mean", float(value))
    for layer, row in tables["table9_olmoe_progressive_k7"].items():
        for statistic, value in row.items():
            yield PublishedValue("Table 9", "olmoe", int(layer), "descending", 7, statistic, float(value))
