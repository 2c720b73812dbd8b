"""Numbers that the summary reads off the derived tables."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_moe.report.figures.ceiling import pooled_shares
from hooked_moe.report.figures.names import FIXED_FAMILIES
from hooked_moe.report.inputs import Inputs

Row = dict[str, Any]


def position_cells(inputs: Inputs, population: str, families: Sequence[str]) -> list[Row]:
    """Cells of the paper's protocol in scope position."""
    return [
        row
        for row in inputs.rows("cells.csv")
        if (row["scope"], row["population"]) == ("position", population) and row["family"] in families
    ]


@dataclass(frozen=True)
class CeilingReading:
    """The mean ceiling over layers, the criterion that comes nearest, and the shares of it that this one and the oracle reach."""

    ceiling: float
    best: str
    best_share: float
    oracle_share: float
    """NaN without an oracle."""


def ceiling_reading(inputs: Inputs) -> CeilingReading | None:
    if "ceiling.csv" not in inputs.tables:
        return None
    table = inputs.tables["ceiling.csv"]
    shares = pooled_shares(table)
    criteria = {name: value for name, (family, value) in shares.items() if family in FIXED_FAMILIES and not math.isnan(value)}
    ceiling = known_mean({row["layer"]: row["ceiling"] for row in table.to_pylist()}.values())
    if not criteria or math.isnan(ceiling):
        return None
    best = max(criteria, key=criteria.__getitem__)
    oracle_share = next((value for family, value in shares.values() if family == "oracle"), math.nan)
    return CeilingReading(ceiling, best, criteria[best], oracle_share)


def known_mean(values: Iterable[float]) -> float:
    """The mean of the values that are defined; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
