"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v; one shared expert behind a sigmoid gate; some layers may be dense."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion.common import (
    AROUND_THE_BLOCKS,
    ATTENTION,
    BLOCK_NORMS,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    HF,
    OURS,
    gated_mlp,
    head_width,
    read_common,
    read_dense_layers,
    write_common,
    write_dense_layers,
)
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    hf.refuse_unsupported(sliding_window_switch=False)
    return HookedMoEConfig(
        **read_common(hf, n_ctx=32768, eps=1e-6, n_key_value_heads=16),
        **read_dense_layers(hf),
        **hf.rotary(default_base=10_000.0),
        model_type="qwen2_moe",
        d_head=head_width(hf),
        qkv_bias=hf.boolean("qkv_bias", default=True),
        num_experts=hf.integer("num_experts", "num_local_experts"),
        d_expert=hf.integer("moe_intermediate_size"),
        norm_topk_prob=hf.boolean("norm_topk_prob", default=False),
        d_shared=hf.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    return (
        write_common(cfg, "Qwen2MoeForCausalLM")
        | write_dense_layers(cfg)
        | {
            "head_dim": cfg.d_head,
            "qkv_bias": cfg.qkv_bias,
            "num_experts": cfg.num_experts,
            "moe_intermediate_size": cfg.d_expert,
            "norm_topk_prob": cfg.norm_topk_prob,
            "shared_expert_intermediate_size": cfg.d_shared,
            "use_sliding_window": False,
            "sliding_window": None,
        }
    )


QWEN2_MOE = Conversion(
    model_type="qwen2_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *AROUND_THE_BLOCKS,
        *BLOCK_NORMS,
        *ATTENTION,
        *EXPERTS,
        *gated_mlp(HF + "mlp.shared_expert", OURS + "mlp.shared", "d_shared"),
        Weight(HF + "mlp.shared_expert_gate.weight", OURS + "mlp.W_shared_gate", "one d_model"),
        *DENSE_MLP,
    ),
    alternatives=FUSED_EXPERTS,
)
