"""The models of the factor study: what a point of the design means, and how its model is trained.

All have tiny-olmoe's shape and 192 routed (or routed and shared) neurons active at a token, so that they compute alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.support.training_state import load_state, steps_done
from experiments.train_tiny import ARCHITECTURES, Recipe, new_model, optimiser, train
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.surgery import upcycle

STEPS = 660
ACTIVE_WIDTH = 192
SHARED_WIDTH = 48
SAVE_EVERY = 60
_STATE = "state.safetensors"


def config_of(levels: Mapping[str, int], name: str) -> HookedMoEConfig:
    """The architecture of a point of the design: `levels` are -1 or +1 of F1 to F7, as `FACTORS` describes them."""
    high = {factor: level > 0 for factor, level in levels.items()}
    k = 8 if high["F2"] else 2
    shared = SHARED_WIDTH if high["F5"] else None
    return ARCHITECTURES["tiny-olmoe"].replace(
        model_name=name,
        num_experts=k * (4 if high["F1"] else 8),
        experts_per_token=k,
        d_expert=(ACTIVE_WIDTH - (shared or 0)) // k,
        norm_topk_prob=high["F3"],
        d_shared=shared,
        dense_layers=(0,) if high["F7"] else (),
        d_mlp=ACTIVE_WIDTH if high["F7"] else None,
    )


def recipe_of(levels: Mapping[str, int], seed: int, steps: int = STEPS) -> Recipe:
    """The shipped models' recipe but for its length and F4, the coefficient of load balancing."""
    return Recipe(steps=steps, seed=seed, load_balancing=0.02 if levels["F4"] > 0 else 0.001)


def dense_config(cfg: HookedMoEConfig) -> HookedMoEConfig:
    """The same with one MLP a layer, as wide as what is active: one expert that every token goes to."""
    one_expert = {"num_experts": 1, "experts_per_token": 1, "d_expert": ACTIVE_WIDTH, "norm_topk_prob": True}
    return cfg.replace(**one_expert, d_shared=None, dense_layers=(), d_mlp=None)


def train_run(levels: Mapping[str, int], seed: int, tokens: np.ndarray, out: Path, steps: int = STEPS) -> None:
    """Train the model of a point, resuming where a killed run stopped; its weights are in `out`/state.safetensors.

    With F6 high, the first half of the steps trains the dense model (in `out`/dense), and the second half its upcycled copy.
    """
    cfg, recipe = config_of(levels, out.name), recipe_of(levels, seed, steps)
    start = None
    if levels["F6"] > 0:
        dense, half = dense_config(cfg), steps // 2
        train(dense, replace(recipe, expert_out_scale=1.0), tokens, out / "dense", SAVE_EVERY, stop_at=half)
        recipe = replace(recipe, first_step=half)
        start = upcycle(trained(dense, recipe, out / "dense"), cfg, seed=seed)
    train(cfg, recipe, tokens, out, SAVE_EVERY, start)


def trained(cfg: HookedMoEConfig, recipe: Recipe, directory: Path) -> HookedMoE:
    """The model whose state `train` left in a directory."""
    model = new_model(cfg, recipe)
    load_state(directory / _STATE, model, optimiser(model, recipe))
    return model


def is_trained(directory: Path, steps: int = STEPS) -> bool:
    """Whether a run's training came to its end."""
    return steps_done(directory / _STATE) >= steps
