"""The figures of a run's page: which there are, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pyarrow as pa

from hooked_moe.report.budgeted_sections import is_budgeted
from hooked_moe.report.figures.ceiling import static_ceiling
from hooked_moe.report.figures.drawing import Drawing
from hooked_moe.report.figures.effect_size import effect_size
from hooked_moe.report.figures.experts import experts
from hooked_moe.report.figures.progressive import progressive
from hooked_moe.report.figures.pruning import pruning
from hooked_moe.report.figures.rank_correlation import rank_correlation
from hooked_moe.report.figures.redistribution import redistribution
from hooked_moe.report.figures.removal_effect import removal_effect, slot_distribution, slots
from hooked_moe.report.figures.savings import savings
from hooked_moe.report.figures.scopes import scopes
from hooked_moe.report.figures.verdict import verdict
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.savings import MARGIN, read_savings


def run_drawings(inputs: Inputs) -> list[Drawing]:
    """A drawing of each derived table that the run has and a figure is made of."""
    return [draw(inputs.tables[name]) for name, draw in _figures(inputs) if name in inputs.tables]


def _figures(inputs: Inputs) -> Iterator[tuple[str, Callable[[pa.Table], Drawing]]]:
    """Tables, and what draws them. The order numbers the figures."""
    n_layers = inputs.n_layers
    yield "savings.csv", verdict
    if read_savings(inputs).rows:
        yield "savings.csv", partial(savings, margin=MARGIN)
    if inputs.rows("pruning.csv"):
        yield "pruning.csv", pruning
    if not is_budgeted(inputs):
        yield "savings.csv", rank_correlation
    yield "layers.csv", removal_effect
    yield "slots.csv", slots
    yield "slot_distribution.csv", partial(slot_distribution, noise_floor=inputs.noise_floor)
    yield "experts.parquet", experts
    yield "ceiling.csv", static_ceiling
    yield "ceiling_kl.csv", partial(static_ceiling, of_kl=True)
    yield "redistribution.csv", partial(redistribution, n_layers=n_layers)
    yield "progressive.csv", progressive
    yield "scopes.csv", scopes
    yield "cells.csv", partial(effect_size, n_layers=n_layers)
