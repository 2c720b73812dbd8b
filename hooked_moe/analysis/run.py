"""From the measured tables of a run to the derived ones: no model, bounded memory, and the same bytes each time.

    effects.parquet            -> experts.parquet, savings.csv, cells.csv, positions.csv, layers.csv, slots.csv,
                                  slot_distribution.csv, ceiling.csv, bayes.csv, expert_effect_sums.parquet,
                                  expert_tokens.parquet, redistribution.csv, redistribution_experts.csv
      its column kl            -> ceiling_kl.csv, and the rows of effect kl in savings.csv
    routing.parquet            -> criteria of routing, in experts.parquet
    expert_weights.parquet     -> criteria of the weights, in experts.parquet
    tokens.parquet             -> token_shares.parquet
    effects_sequence.parquet   -> scopes.csv, and the cells of the sequence scope
    documents.parquet          -> domains.csv
    progressive.parquet        -> progressive.csv
    all of these               -> analysis.json: of what the derived files were made, what was not measured, and why

Here is which file comes from which; the numbers are those of the modules imported. Rankings depend on the whole corpus, so the
effect tables are streamed twice: `_FirstPass`, then all that needs the criteria or the number of positions. What
is kept grows with layers, experts and documents, not with tokens.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from threadpoolctl import threadpool_limits

from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator, ExpertStatistics
from hooked_moe.analysis.accumulators.survey import Survey
from hooked_moe.analysis.accumulators.token_rows import TokenRows
from hooked_moe.analysis.bayes import ChoiceData
from hooked_moe.analysis.ceilings import ceiling_table
from hooked_moe.analysis.cells import Cell, CellAudit, cells_table, chosen_layers
from hooked_moe.analysis.criteria import criteria_table
from hooked_moe.analysis.expert_tokens import TokenShares, TopEffects
from hooked_moe.analysis.progressive import progressive_table
from hooked_moe.analysis.rankings import Scores
from hooked_moe.analysis.redistribution import RedistributionAccumulator, layer_redistribution
from hooked_moe.analysis.run_chunks import RunChunk, run_chunks
from hooked_moe.analysis.saving_table import saving_table
from hooked_moe.analysis.savings import SavingAudit
from hooked_moe.analysis.summaries import DomainSummary, LayerSummary, ScopeSummary, SlotSummary
from hooked_moe.checks import whole_numbers
from hooked_moe.progress import progress_bar
from hooked_moe.tables import (
    MEASURED_TABLES,
    FileRecord,
    Ledger,
    read_checked_json,
    required_file,
    write_csv_atomic,
    write_parquet_atomic,
)

_THREADS = 2
"""What is derived is many numpy calls on long arrays, which let other threads run; more of them would wait for each other."""


def analyse_run(
    run_dir: str | os.PathLike[str],
    *,
    n_experts: int,
    layers: Iterable[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
    progress: bool = False,
) -> list[Cell]:
    """Derive every table of a run from its measured ones and return the cells.

    `n_experts` counts the routed experts of a layer, so that those never selected have their row. `layers` restricts the
    savings, cells, ceilings and bayes.csv, not the other tables. What a run has not measured is named in analysis.json.
    `progress` shows a bar of the two passes over the effects and of the tables made of them.

    Raises FileNotFoundError without effects.parquet, ValueError for unknown layers, for a sample larger than the corpus and for
    tables that are not of one measurement.
    """
    run, layers = Path(run_dir), None if layers is None else whole_numbers(layers, "layers")  # which may be an iterator
    required_file(run, "effects.parquet", "the measurement writes it")
    with (
        threadpool_limits(1, "blas"),  # whose threads wait in a loop, on the processor that our other thread needs
        progress_bar(None, "analysing", " steps", shown=progress, delay=1.0) as bar,
    ):
        derived, cells, missing = _derive(run, n_experts, layers, n_positions, seed, bar)
    for name, table in derived.items():
        (write_parquet_atomic if name.endswith(".parquet") else write_csv_atomic)(table, run / name)
    settings = _settings(run, n_experts, layers, n_positions, seed)
    Ledger(run).record(_ANALYSIS, _INPUTS, derived, settings=settings, command="hooked-moe audit", not_measured=missing)
    return cells


def analysis_fault(
    run: Path,
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
    known: Mapping[str, FileRecord | None] | None = None,
) -> str | None:
    """Why the derived tables are not those that `analyse_run` would write now; None where they are. `known` is as in `Ledger`."""
    return Ledger(run, known).fault(_ANALYSIS, _INPUTS, _settings(run, n_experts, layers, n_positions, seed))


_ANALYSIS = "analysis"
_INPUTS = tuple(f"{name}.parquet" for name in MEASURED_TABLES)


def _settings(run: Path, n_experts: int, layers: Sequence[int] | None, n_positions: int, seed: int) -> dict[str, Any]:
    """All that decides the derived tables beside the measured ones."""
    options = {"n_experts": n_experts, "n_positions": n_positions, "seed": seed, "noise_floor": _noise_floor(run)}
    return options | {"layers": None if layers is None else list(layers)}


def _derive(
    run: Path, n_experts: int, layers: Iterable[int] | None, n_positions: int, seed: int, bar: Any
) -> tuple[dict[str, pa.Table], list[Cell], dict[str, str]]:
    """Every derived table by the name of its file, the cells, and what was not measured."""
    with ThreadPoolExecutor(1) as importer:
        importer.submit(importlib.import_module, "scipy.stats")  # half a second, which the cells would wait for
        first = _FirstPass(run, n_experts, layers)
    optional = {name: run / name if (run / name).is_file() else None for name in ("routing.parquet", "expert_weights.parquet")}
    statistics = first.experts.statistics(*optional.values())
    bar.update()
    second = _SecondPass(run, first, statistics, n_positions, seed)

    missing = {name: "this run has not measured it" for name, path in optional.items() if path is None}
    experts = second.criteria
    survey = first.surveys["position"]
    for name, values in survey.sums.mean_delta().items():
        experts = experts.append_column(_EXPERT_COLUMNS[name], [values])
    making: dict[str, Callable[[], pa.Table]] = {  # the longest first
        "savings.csv": partial(saving_table, second.savings),
        "bayes.csv": second.choices.table,
        "ceiling.csv": partial(ceiling_table, survey.layers, survey.ceilings, second.criteria),
        "expert_effect_sums.parquet": survey.sums.table,
        "positions.csv": second.audits["position"].frozen_positions,
        "layers.csv": second.layers.table,
        "slots.csv": second.slots.table,
        "slot_distribution.csv": second.layers.slot_distribution,
        "expert_tokens.parquet": first.top_effects.table,
    }
    if second.token_shares is None:
        missing["token_shares.parquet"] = "this run has no tokens.parquet, or no column kl in its effect table"
    else:
        making["token_shares.parquet"] = second.token_shares.table
    if "kl" in survey.sums.effects:
        making["ceiling_kl.csv"] = partial(ceiling_table, survey.layers, survey.log_kl_ceilings, second.criteria)
    else:
        missing["ceiling_kl.csv"] = "the effect table has no column kl"
    if second.redistribution.unmeasured:
        missing["redistribution.csv"] = second.redistribution.unmeasured
    else:
        making["redistribution_experts.csv"] = second.redistribution.experts
    bar.total = 2 + len(making)
    bar.update()
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = {name: pool.submit(make) for name, make in making.items()}
        for table in tables.values():
            table.add_done_callback(lambda _: bar.update())
        cells = [cell for audit in second.audits.values() for cell in audit.cells()]
        derived = {"experts.parquet": experts, "cells.csv": cells_table(cells)}
        derived |= {name: table.result() for name, table in tables.items()}
    if "redistribution_experts.csv" in derived:
        derived["redistribution.csv"] = layer_redistribution(derived["redistribution_experts.csv"])
    for name, summary, source in (
        ("domains.csv", second.domains, "documents.parquet"),
        ("scopes.csv", second.scopes, "effects_sequence.parquet"),
    ):
        if summary is None:
            missing[name] = f"this run has no {source}"
        else:
            derived[name] = summary.table()
    if (run / "progressive.parquet").is_file():
        derived["progressive.csv"] = progressive_table(run / "progressive.parquet")
    else:
        missing["progressive.csv"] = "this run has no progressive.parquet"
    return derived, cells, missing


_EXPERT_COLUMNS = {
    name: pa.field(name, kind, metadata={"unit": unit, "meaning": meaning})
    for name, kind, unit, meaning in (
        ("n_removals", pa.int64(), "removals", "removals of the expert that were measured"),
        ("mean_delta", pa.float64(), "nats", "mean delta_loss over them"),
        ("mean_delta_se", pa.float64(), "nats", "its standard error, clustered by document"),
    )
}


class _FirstPass:
    """The criteria of every expert, and a survey of the measured positions in each scope."""

    def __init__(self, run: Path, n_experts: int, layers: Iterable[int] | None) -> None:
        experts: ExpertAccumulator | None = None
        for chunk in run_chunks(run):
            if experts is None:
                experts = ExpertAccumulator(chunk.observed.layers, n_experts)
                wanted = chosen_layers(chunk.observed, layers)
                self.surveys = {scope: Survey(wanted, n_experts, grid.layers) for scope, grid in chunk.measured.items()}
                self.n_slots = chunk.observed.n_slots
                self.top_effects = TopEffects(chunk.observed.layers)
            experts.update(chunk.observed)
            self.top_effects.update(chunk.measured["position"])
            for scope, grid in chunk.measured.items():
                self.surveys[scope].update(grid)
        assert experts is not None  # effect_chunks refuses an empty table
        self.experts = experts


class _SecondPass:
    """Everything that takes the criteria, the number of positions or the list of documents to begin."""

    def __init__(self, run: Path, first: _FirstPass, statistics: ExpertStatistics, n_positions: int, seed: int) -> None:
        survey = first.surveys["position"]
        documents = survey.documents()
        layers = first.experts.layers
        self.criteria = criteria_table(statistics)
        self.audits = {}
        for scope, surveyed in first.surveys.items():
            scores = Scores(self.criteria, surveyed.sums, surveyed.layers)
            # a scope that was measured at fewer positions than the sample has is sampled whole
            n = n_positions if scope == "position" else min(n_positions, surveyed.n_measured)
            self.audits[scope] = CellAudit(surveyed, scores, n, seed, scope)
        scores = self.audits["position"].scores
        self.savings = SavingAudit(scores, survey.sums, documents, first.n_slots, survey.n_measured, seed)
        self.choices = ChoiceData(scores, survey.n_measured, len(survey.layers))
        self.layers = LayerSummary(layers, first.n_slots, _noise_floor(run))
        self.slots = SlotSummary(layers, first.n_slots, documents)
        self.redistribution = RedistributionAccumulator(layers, statistics.n_tokens)
        self.domains = DomainSummary(documents, run) if (run / "documents.parquet").is_file() else None
        self.scopes = ScopeSummary(layers) if "sequence" in first.surveys else None
        tokens = run / "tokens.parquet"
        self.token_shares: TokenShares | None = None
        if tokens.is_file() and "kl" in survey.sums.effects:
            self.token_shares, self._tokens = TokenShares(first.top_effects.tokens(tokens), survey.sums), TokenRows(tokens)
        with ThreadPoolExecutor(_THREADS) as pool:
            for chunk in run_chunks(run):
                for done in [pool.submit(update) for update in self._updates(chunk)]:
                    done.result()

    def _updates(self, chunk: RunChunk) -> Iterator[Callable[[], object]]:
        """What the chunk adds to each of them, by itself."""
        measured = chunk.measured["position"]
        yield from self.savings.updates(measured)  # the longest first
        for scope, grid in chunk.measured.items():
            yield partial(self.audits[scope].update, grid)
        yield partial(self.choices.update, measured)
        yield partial(self.layers.update, chunk.observed, measured)
        yield partial(self.slots.update, measured)
        yield partial(self.redistribution.update, chunk.observed)
        if self.token_shares is not None:
            token = self._tokens.of(chunk.observed)[chunk.observed.valid]
            yield partial(self.token_shares.update, measured, token)
        if self.domains is not None:
            yield partial(self.domains.update, measured)
        if self.scopes is not None:
            yield partial(self.scopes.update, measured, chunk.measured["sequence"])


def _noise_floor(run: Path) -> float | None:
    """In nats, as the manifest records it; None where it does not."""
    path = run / "manifest.json"
    floor = read_checked_json(path).get("noise_floor") if path.is_file() else None
    value = floor.get("max_abs_nats") if isinstance(floor, dict) else None
    return float(value) if isinstance(value, int | float) and value > 0 else None
