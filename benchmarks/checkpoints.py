"""Random checkpoints as the hub has them, of any size: written one block at a time, a file for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.config import YarnScaling
from hooked_moe.loading.checkpoint import INDEX_FILE
from weights_conversion import CONVERSIONS
from weights_conversion.weight_map import slots_by_parameter

LAYERS_OF_LITE = 27


def deepseek_v2_lite(n_layers: int, small: bool = False) -> HookedMoEConfig:
    """DeepSeek-V2-Lite with its real widths (or, `small`, a 32nd of them) and so many of its 27 layers; the first is dense."""
    widths = {
        "d_model": 2048,
        "d_vocab": 102400,
        "d_head": 192,
        "d_rotary": 64,
        "d_value": 128,
        "kv_lora_rank": 512,
        "d_expert": 1408,
        "d_shared": 2816,
        "d_mlp": 10944,
    }
    scaled: dict[str, Any] = {name: width // 32 for name, width in widths.items()} if small else widths
    return HookedMoEConfig(
        **scaled,
        model_type="deepseek_v2",
        n_layers=n_layers,
        n_ctx=163840,
        n_heads=16,
        n_key_value_heads=16,
        rotary_interleaved=True,
        rotary_scaling=YarnScaling(factor=40.0, original_ctx=4096, mscale=0.707, mscale_all_dim=0.707),
        num_experts=64,
        experts_per_token=6,
        dense_layers=(0,),
        eps=1e-6,
        dtype=torch.bfloat16,
    )


def tensors_of(cfg: HookedMoEConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by the names of the hub, for each part of the model: "blocks.0" and so on, and what is beside the blocks."""
    parameters = dict(HookedMoE(cfg.replace(device=torch.device("meta"))).named_parameters())
    slots = slots_by_parameter(CONVERSIONS[cfg.model_type].weights, cfg, parameters)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in parameters.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"
        parts.setdefault(part, {}).update({slot.hf_name: tuple(slot.of(parameter).shape) for slot in slots[name]})
    return parts


def nbytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def write(cfg: HookedMoEConfig, directory: Path) -> None:
    """Write a checkpoint in the config's dtype, unless it is there already; config.json comes last, so that half of one is none.

    Raises `OSError` where the disk is too small, and `FileExistsError` for a directory with something else in it.
    """
    config = CONVERSIONS[cfg.model_type].to_hf(cfg)
    file = directory / "config.json"
    if file.is_file() and json.loads(file.read_text()) == json.loads(json.dumps(config)):
        return
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds something else than this checkpoint: give a new directory")
    parts = tensors_of(cfg)
    needed, free = sum(nbytes(shapes, cfg.dtype) for shapes in parts.values()), shutil.disk_usage(directory).free
    if free < 1.05 * needed:
        raise OSError(f"{directory} has {free / 1e9:.1f} GB free, and the checkpoint takes {needed / 1e9:.1f} GB")
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for part, shapes in tqdm(parts.items(), desc="writing", unit="file", disable=None):
        name = f"model-{part}.safetensors"
        save_file(
            {key: random_weight(key, shape, cfg.dtype) for key, shape in shapes.items()}, directory / name, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(shapes, name)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": needed}, "weight_map": weight_map}, indent=2))
    file.write_text(json.dumps(config, indent=2))


def random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.empty(shape, dtype=dtype)
    return weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02)
