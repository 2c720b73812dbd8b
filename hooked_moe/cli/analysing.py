"""From a measured run to its derived tables and its report, once for whatever was measured."""

from __future__ import annotations

from pathlib import Path

from hooked_moe.analysis import analyse_run
from hooked_moe.cli.measuring import SEED
from hooked_moe.measurement import Run
from hooked_moe.report import write_report
from hooked_moe.tables import required_file

SAMPLE_SIZE = 200
MEASURED = ("effects", "effects_sequence", "progressive", "routing", "expert_weights", "documents")


def analyse(run: Run) -> Path:
    """Derive what the run's measured tables give, unless that was done since they were written; returns the report's path."""
    required_file(run.directory, "effects.parquet", "no removals were measured yet")
    done = run.directory / "analysis.json"
    tables = [run.directory / f"{name}.parquet" for name in MEASURED]
    newest = max(path.stat().st_mtime_ns for path in tables if path.is_file())
    report = run.directory / "report.html"
    if not (done.is_file() and report.is_file() and done.stat().st_mtime_ns >= newest):
        positions = run.manifest["parts"]["position"]["positions"]
        available = len(run.tokenized.valid_positions()) if positions == "all" else int(positions)
        analyse_run(
            run.directory,
            n_experts=run.model.cfg.num_experts,
            layers=run.layers,
            n_positions=min(SAMPLE_SIZE, available),
            seed=SEED,
        )
        report = write_report(run.directory)
    return report
