"""Numbers that the summary and the conclusions read off the derived tables.

Verdicts are read off population "all" where it was not refused, else off the sample; scope position throughout.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hooked_moe.report.figures.ceiling import pooled_shares
from hooked_moe.report.inputs import Inputs

Row = dict[str, Any]

FIXED = ("paper", "extended")  # families of rankings that are fixed for the corpus


def verdict_cells(inputs: Inputs, families: Sequence[str]) -> list[Row]:
    """Cells of scope position that the summary goes by: over all positions, or the sample where those were all refused."""
    cells = position_cells(inputs, "all", families)
    refused = all(row["verdict"] == "refused" for row in cells)
    return (position_cells(inputs, "sample", families) or cells) if refused else cells


def position_cells(inputs: Inputs, population: str, families: Sequence[str]) -> list[Row]:
    return [
        row
        for row in inputs.rows("cells.csv")
        if (row["scope"], row["population"]) == ("position", population) and row["family"] in families
    ]


def best_fixed(inputs: Inputs) -> tuple[str, float] | None:
    """The fixed criterion of the highest mean rank correlation over layers."""
    by_ranking: dict[str, list[float]] = {}
    for row in verdict_cells(inputs, FIXED):
        by_ranking.setdefault(row["ranking"], []).append(row["spearman"])
    means = {ranking: known_mean(values) for ranking, values in by_ranking.items()}
    means = {ranking: value for ranking, value in means.items() if not math.isnan(value)}
    return max(means.items(), key=lambda item: item[1]) if means else None


def ceiling_reading(inputs: Inputs) -> tuple[float, str, float, float] | None:
    """Mean ceiling over layers, the best criterion, its pooled share, and the oracle's (NaN without one)."""
    if "ceiling.csv" not in inputs.tables:
        return None
    table = inputs.tables["ceiling.csv"]
    shares = pooled_shares(table)
    criteria = {name: value for name, (family, value) in shares.items() if family in FIXED and not math.isnan(value)}
    value = known_mean({row["layer"]: row["ceiling"] for row in table.to_pylist()}.values())
    if not criteria or math.isnan(value):
        return None
    best = max(criteria, key=criteria.__getitem__)
    oracle = next((value for family, value in shares.values() if family == "oracle"), math.nan)
    return value, best, criteria[best], oracle


def known_mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
