"""The state of a training, saved so that a killed one resumes to the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hooked_moe import HookedMoE
from hooked_moe.tables import atomic_path


def save_state(path: Path, model: HookedMoE, optim: torch.optim.AdamW, step: int) -> None:
    """Weights, both moments and the step in one safetensors file, which is there whole or not at all.

    `updates` is how many the optimiser made: fewer than `step` where another one made the first ones (upcycling).
    """
    state, updates = {}, 0
    for name, parameter in model.named_parameters():
        state[f"weight/{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}/{name}"] = optim.state[parameter][moment]
        updates = int(optim.state[parameter]["step"])
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"step": str(step), "updates": str(updates)})


def load_state(path: Path, model: HookedMoE, optim: torch.optim.AdamW) -> int:
    """The inverse of `save_state`; returns the number of steps done."""
    state, metadata = load_file(path), _metadata(path)
    updates = float(metadata.get("updates", metadata["step"]))  # files from before upcycling have the step alone
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
            moments = {moment: state[f"{moment}/{name}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
            optim.state[parameter] = {"step": torch.tensor(updates), **moments}
    return int(metadata["step"])


def steps_done(path: Path) -> int:
    """The step of a saved state; 0 where there is none."""
    return int(_metadata(path)["step"]) if path.exists() else 0


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata
