"""A model in a few lines, as its `repr` shows it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hooked_moe.config import HookedMoEConfig


def description(cfg: HookedMoEConfig, parameters: Mapping[str, nn.Parameter], hook_points: int, tokenizer: str) -> str:
    """Sizes and options, a line for each part. `parameters` are the model's by name, `tokenizer` what is said of it."""
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    idle = sum(
        size // len(parameters[name]) * (len(parameters[name]) - cfg.experts_per_token)
        for name, size in sizes.items()
        if ".mlp.experts." in name
    )
    total = sum(sizes.values())
    dtype = str(cfg.dtype).removeprefix("torch.")
    if cfg.store is not None:
        dtype += f", experts stored in {str(cfg.store).removeprefix('torch.')},"
    lines = [
        f"{cfg.model_name} ({cfg.model_type}): {_short(total)} parameters, {_short(total - idle)} of them active for a token; "
        f"{dtype} on {cfg.device}",
        f"  {cfg.n_layers} layers of width {cfg.d_model}; vocabulary of {cfg.d_vocab}; contexts up to {cfg.n_ctx} tokens",
        f"  attention: {cfg.n_heads} heads of width {cfg.d_head}, {_keys(cfg)}",
        f"  experts: {_experts(cfg)}",
    ]
    if cfg.dense_layers:
        lines.append(
            f"  dense: {'layer' if len(cfg.dense_layers) == 1 else 'layers'} {_numbers(cfg.dense_layers)}, width {cfg.d_mlp}"
        )
    return "\n".join([*lines, f"  tokenizer: {tokenizer}", f"  {hook_points} hook points: see model.hook_dict"])


def _keys(cfg: HookedMoEConfig) -> str:
    if cfg.kv_lora_rank is not None:
        return f"keys and values from a latent vector of width {cfg.kv_lora_rank}"
    return "as many key/value heads" if cfg.n_key_value_heads == cfg.n_heads else f"{cfg.n_key_value_heads} key/value heads"


def _experts(cfg: HookedMoEConfig) -> str:
    counts = sorted({cfg.experts_in(layer) for layer in cfg.moe_layers})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    shared = "none shared" if cfg.d_shared is None else f"shared ones of width {cfg.d_shared}"
    return f"{number} in a layer, {cfg.experts_per_token} of them for a token, width {cfg.d_expert}; {shared}"


def _numbers(layers: tuple[int, ...]) -> str:
    """ "0 to 3", or "1, 4 and 7"; past eight of them, how many."""
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    if len(layers) > 8:
        return f"{layers[0]}, {layers[1]}, ... {layers[-1]} ({len(layers)})"
    return " and ".join(filter(None, (", ".join(map(str, layers[:-1])), str(layers[-1]))))


def _short(count: int) -> str:
    """Three figures: 6.92 billion."""
    for unit, size in ((" billion", 1e9), (" million", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
