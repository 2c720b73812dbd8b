"""From the measured tables of a run to the derived ones: numpy tables in, tables out, no model."""

from hooked_moe.analysis.run import analyse_run

__all__ = ["analyse_run"]
