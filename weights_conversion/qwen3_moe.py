"""Qwen3-MoE (arXiv 2505.09388): a norm of every head's query and key, an explicit head width, no shared expert."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion.common import (
    AROUND_THE_BLOCKS,
    ATTENTION,
    BLOCK_NORMS,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    head_width,
    read_common,
    read_dense_layers,
    write_common,
    write_dense_layers,
)
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    hf.refuse_unsupported(sliding_window_switch=False)
    bias = hf.boolean("attention_bias", default=False)
    return HookedMoEConfig(
        **read_common(hf, n_ctx=32768, eps=1e-6, n_key_value_heads=4),
        **read_dense_layers(hf),
        **hf.rotary(default_base=10_000.0),
        model_type="qwen3_moe",
        d_head=head_width(hf),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        num_experts=hf.integer("num_experts", "num_local_experts"),
        d_expert=hf.integer("moe_intermediate_size"),
        norm_topk_prob=hf.boolean("norm_topk_prob", default=False),
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    return (
        write_common(cfg, "Qwen3MoeForCausalLM")
        | write_dense_layers(cfg)
        | {
            "head_dim": cfg.d_head,
            "attention_bias": cfg.qkv_bias,
            "num_experts": cfg.num_experts,
            "moe_intermediate_size": cfg.d_expert,
            "norm_topk_prob": cfg.norm_topk_prob,
            "use_sliding_window": False,
            "sliding_window": None,
        }
    )


QWEN3_MOE = Conversion(
    model_type="qwen3_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(*AROUND_THE_BLOCKS, *BLOCK_NORMS, *ATTENTION, *EXPERTS, *DENSE_MLP),
    alternatives=FUSED_EXPERTS,
)
