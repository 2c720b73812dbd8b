"""The sizes of a config.json against the headers of the weights, before anything of these sizes is made."""

from __future__ import annotations

import re

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.checkpoint import Checkpoint
from weights_conversion import CheckpointError, Conversion, abbreviated
from weights_conversion.common import HF, OURS

_LAYER = re.compile(re.escape(HF).replace(re.escape("{layer}"), "([0-9]{1,9})"))


def check_sizes(cfg: HookedMoEConfig, conversion: Conversion, checkpoint: Checkpoint) -> None:
    """Refuse a config that describes more than the checkpoint holds: layers, experts, or widths.

    A model takes memory for every layer and expert before it has a weight, so a config is believed only as far as the headers
    bear it out. Whether all tensors are there, in their shapes, is for `plan_copies`, which needs the model. Raises
    `CheckpointError`.
    """
    layers = {int(match[1]) for name in checkpoint.tensors if (match := _LAYER.match(name))}
    values = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())
    if cfg.n_layers > len(layers):
        problem = f"{cfg.n_layers:,} layers, and the tensors are of {len(layers):,}"
    elif wrong := _wrong_routers(cfg, conversion, checkpoint):
        problem = f"routers in {len(cfg.moe_layers)} layers, and these are missing or of another shape:{abbreviated(wrong)}"
    elif wide := [f"{name} = {width:,}" for name, width in _widths(cfg).items() if width > values]:
        problem = f"{', '.join(wide)}, and all tensors together hold {values:,} numbers"
    else:
        return
    raise CheckpointError(
        f"the tensors in {checkpoint.directory} are not those that its config.json describes ({cfg.model_type}). Check that both "
        f"are of one model and complete. config.json describes {problem}"
    )


def _wrong_routers(cfg: HookedMoEConfig, conversion: Conversion, checkpoint: Checkpoint) -> list[str]:
    """The routers say how many experts a layer has: those that are missing, or say another number."""
    rows = [weight.hf for weight in (*conversion.weights, *conversion.alternatives) if weight.ours == OURS + "mlp.router.W"]
    wrong = []
    for layer in cfg.moe_layers:
        names = [row.replace("{layer}", str(layer)) for row in rows]
        stored = next((name for name in names if name in checkpoint.tensors), None)
        expected = cfg.experts_in(layer), cfg.d_model
        if stored is None:
            wrong.append(names[0])
        elif checkpoint.tensors[stored].shape != expected:
            wrong.append(f"{stored}: {list(checkpoint.tensors[stored].shape)}, expected {list(expected)} (expert d_model)")
    return wrong


def _widths(cfg: HookedMoEConfig) -> dict[str, int]:
    """Every size that is the length, or part of the length, of some tensor's axis."""
    names = ("d_vocab", "d_expert", "d_mlp", "d_shared", "kv_lora_rank", "q_lora_rank")
    return {name: getattr(cfg, name) or 0 for name in names} | {
        "n_heads x d_head": cfg.n_heads * cfg.d_head,
        "n_key_value_heads x d_head": cfg.n_key_value_heads * cfg.d_head,
        "n_heads x d_value": cfg.n_heads * cfg.value_width,
    }
