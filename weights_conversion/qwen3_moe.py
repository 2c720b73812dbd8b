"""Qwen3-MoE (arXiv 2505.09388): a norm of every head's query and key, an explicit head width, no shared expert."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    bias = hf.boolean("attention_bias", default=False)
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=32768, eps=1e-6, rotary_base=10_000.0, n_key_value_heads=4, sliding_window_switch=False),
        **common.read_qwen(hf),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    own = {"attention_bias": cfg.qkv_bias}
    return common.write_all(cfg, "Qwen3MoeForCausalLM") | common.write_qwen(cfg) | own


QWEN3_MOE = Conversion(
    model_type="qwen3_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *common.ATTENTION, *common.EXPERTS, *common.DENSE_MLP),
    alternatives=common.FUSED_EXPERTS,
)
