"""From the measured tables of a run to the derived ones: numpy tables in, tables out, no model."""

from hooked_moe.analysis.criteria import criterion
from hooked_moe.analysis.pruning import PruningForecast, choose_experts, predict_pruning
from hooked_moe.analysis.run import analyse_run, analysis_fault

__all__ = ["PruningForecast", "analyse_run", "analysis_fault", "choose_experts", "criterion", "predict_pruning"]
