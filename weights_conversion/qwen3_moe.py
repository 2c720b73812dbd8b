"""Qwen3-MoE (arXiv 2505.09388): a norm of every head's query and key, an explicit head width, no shared expert."""

from __future__ import annotations

from typing import Any

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    bias = hf.boolean("attention_bias", default=False)
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=32768, eps=1e-6, rotary_base=10_000.0, n_key_value_heads=4, windows=True),
        **_read_window(hf),
        **common.read_qwen(hf),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )


def _read_window(hf: HFConfig) -> dict[str, Any]:
    """In all layers or in none."""
    on = hf.boolean("use_sliding_window", default=False)
    window = hf.integer("sliding_window", default=None if hf.states_null("sliding_window") else 4096) if on else None
    return common.windowed(range(hf.integer("num_hidden_layers")), window)


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    own = {
        "attention_bias": cfg.qkv_bias,
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
    }
    return common.write_all(cfg, "Qwen3MoeForCausalLM") | common.write_qwen(cfg) | own


QWEN3_MOE = Conversion(
    model_type="qwen3_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *common.ATTENTION, *common.EXPERTS, *common.DENSE_MLP),
    alternatives=common.FUSED_EXPERTS,
)
