"""From the measured tables of a run to the derived ones: seconds, no model, and the same bytes each time.

    effects.parquet            -> experts.parquet, cells.csv, layers.csv, positions.csv
    effects_sequence.parquet   -> scopes.csv, and the cells of the sequence scope
    documents.parquet          -> domains.csv

Here is which file comes from which; the numbers are those of `criteria`, `cells` and `summaries`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from hooked_moe.cells import Cell, audit_cells, cells_table, frozen_positions
from hooked_moe.criteria import expert_criteria
from hooked_moe.effect_grid import EffectGrid, read_effects
from hooked_moe.summaries import domain_summary, layer_summary, scope_summary
from hooked_moe.tables import required_file, write_csv_atomic, write_parquet_atomic


def analyse_run(
    run_dir: str | os.PathLike[str],
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
) -> list[Cell]:
    """Derive every table of a run from its effects.parquet and return the cells.

    Writes experts.parquet, cells.csv, layers.csv and positions.csv (the frozen sample), and domains.csv and scopes.csv
    where documents.parquet and effects_sequence.parquet are there. `n_experts` counts the routed experts of a layer, so
    that those never selected have their row. `layers` restricts the cells, not the other tables.

    Raises FileNotFoundError without effects.parquet, ValueError for whatever `audit_cells` refuses.
    """
    run = Path(run_dir)
    path = required_file(run, "effects.parquet", "the measurement writes it")
    grid = read_effects(path)
    if grid.expert.max() >= n_experts:
        raise ValueError(f"{path} has expert {grid.expert.max()}, but the model has {n_experts} experts")
    experts = expert_criteria(path, n_experts=n_experts, layers=grid.layers)
    cells = audit_cells(grid, experts, layers, n_positions, seed)
    sequence = _sequence_grid(run, grid)
    if sequence is not None:
        cells += audit_cells(sequence, experts, layers, n_positions, seed, scope="sequence")
        write_csv_atomic(scope_summary(grid, sequence), run / "scopes.csv")
    write_parquet_atomic(experts, run / "experts.parquet")
    write_csv_atomic(cells_table(cells), run / "cells.csv")
    write_csv_atomic(layer_summary(grid), run / "layers.csv")
    write_csv_atomic(frozen_positions(grid, n_positions, seed), run / "positions.csv")
    if (run / "documents.parquet").exists():
        write_csv_atomic(domain_summary(grid, run), run / "domains.csv")
    return cells


def _sequence_grid(run: Path, grid: EffectGrid) -> EffectGrid | None:
    path = run / "effects_sequence.parquet"
    return grid.with_effects_of(read_effects(path, columns=("expert", "delta_loss"))) if path.is_file() else None
