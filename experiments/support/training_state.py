"""The state of a training, saved so that a killed one resumes to the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hooked_moe import HookedMoE


def save_state(path: Path, model: HookedMoE, optim: torch.optim.AdamW, step: int) -> None:
    """Weights, both moments and the step in one safetensors file, renamed into place."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"weight/{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}/{name}"] = optim.state[parameter][moment]
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, model: HookedMoE, optim: torch.optim.AdamW) -> int:
    """The inverse of `save_state`; returns the number of steps done."""
    state, step = load_file(path), steps_done(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
            moments = {moment: state[f"{moment}/{name}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
            optim.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def steps_done(path: Path) -> int:
    """The step of a saved state; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
