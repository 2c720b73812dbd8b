"""DeepSeek-V2 (arXiv 2405.04434): latent attention, dense first layers, shared experts without a gate, scaled routing weights."""

from __future__ import annotations

from typing import Any

from hooked_moe.checks import quoted
from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.common import HF, OURS
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    no_bias = "projections have no biases here"
    hf.refuse("attention_bias", (False,), no_bias)
    hf.refuse("mlp_bias", (False,), no_bias)
    hf.refuse("moe_layer_freq", (1,), "every layer after the dense ones has experts")
    hf.refuse("scoring_func", ("softmax",), "the router is a softmax")
    hf.refuse("norm_topk_prob", (False,), "transformers and the original code disagree on what it means in this family")
    n_heads = hf.integer("num_attention_heads")
    hf.refuse("num_key_value_heads", (n_heads,), f"latent attention makes keys and values for every head: expected {n_heads}")
    d_expert = hf.integer("moe_intermediate_size")
    shared = 0 if hf.states_null("n_shared_experts") else hf.integer("n_shared_experts", default=2)
    dense = min(hf.integer("first_k_dense_replace", default=0), hf.layers())
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=2048, eps=1e-6, rotary_base=10_000.0, split_temperature=True),
        **_read_groups(hf),
        rotary_interleaved=True,
        d_head=hf.integer("qk_nope_head_dim") + hf.integer("qk_rope_head_dim"),
        d_rotary=hf.integer("qk_rope_head_dim"),
        d_value=hf.integer("v_head_dim"),
        kv_lora_rank=hf.integer("kv_lora_rank"),
        q_lora_rank=None if hf.states_null("q_lora_rank") else hf.integer("q_lora_rank"),
        num_experts=hf.integer("n_routed_experts", "num_experts"),
        d_expert=d_expert,
        routed_scaling_factor=hf.number("routed_scaling_factor", default=1.0),
        d_shared=shared * d_expert or None,
        dense_layers=tuple(range(dense)),
        d_mlp=hf.integer("intermediate_size") if dense else None,
    )


def _read_groups(hf: HFConfig) -> dict[str, Any]:
    method = hf.values.get("topk_method") or "greedy"
    if method == "greedy":
        return {}
    if method != "group_limited_greedy":
        raise hf.error(f"topk_method={quoted(method)} is not supported: 'greedy' and 'group_limited_greedy' are")
    return {"n_expert_groups": hf.integer("n_group"), "groups_per_token": hf.integer("topk_group")}


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    return common.write_all(cfg, "DeepseekV2ForCausalLM") | {
        "qk_nope_head_dim": cfg.d_head - cfg.rotary_width,
        "qk_rope_head_dim": cfg.rotary_width,
        "head_dim": cfg.rotary_width,
        "v_head_dim": cfg.value_width,
        "kv_lora_rank": cfg.kv_lora_rank,
        "q_lora_rank": cfg.q_lora_rank,
        "attention_bias": False,
        "mlp_bias": False,
        "n_routed_experts": cfg.num_experts,
        "n_shared_experts": (cfg.d_shared or 0) // cfg.d_expert,
        "moe_intermediate_size": cfg.d_expert,
        "intermediate_size": cfg.d_mlp or cfg.d_shared or cfg.d_expert,  # not read without dense layers
        "first_k_dense_replace": len(cfg.dense_layers),
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy" if cfg.n_expert_groups > 1 else "greedy",
        "n_group": cfg.n_expert_groups,
        "topk_group": cfg.groups_per_token,
        "scoring_func": "softmax",
        "norm_topk_prob": cfg.norm_topk_prob,
        "routed_scaling_factor": cfg.routed_scaling_factor,
    }


_ATTN = HF + "self_attn."

DEEPSEEK_V2 = Conversion(
    model_type="deepseek_v2",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *common.EMBEDDINGS_AND_NORMS,
        Weight(_ATTN + "q_a_proj.weight", OURS + "attn.W_DQ", "q_lora_rank d_model"),
        Weight(_ATTN + "q_a_layernorm.weight", OURS + "attn.q_norm.w", "q_lora_rank"),
        Weight(_ATTN + "q_b_proj.weight", OURS + "attn.W_Q", "(head d_head) q_lora_rank", when=lambda cfg: bool(cfg.q_lora_rank)),
        Weight(_ATTN + "q_proj.weight", OURS + "attn.W_Q", "(head d_head) d_model", when=lambda cfg: not cfg.q_lora_rank),
        Weight(_ATTN + "kv_a_proj_with_mqa.weight", OURS + "attn.W_DKV", "kv_lora_rank+d_rotary d_model"),
        Weight(_ATTN + "kv_a_layernorm.weight", OURS + "attn.kv_norm.w", "kv_lora_rank"),
        Weight(_ATTN + "kv_b_proj.weight", OURS + "attn.W_UKV", "(head content+d_value) kv_lora_rank"),
        Weight(_ATTN + "o_proj.weight", OURS + "attn.W_O", "d_model (head d_value)"),
        *common.EXPERTS,
        *common.gated_mlp(HF + "mlp.shared_experts", OURS + "mlp.shared", "d_shared"),
        *common.DENSE_MLP,
    ),
    alternatives=common.FUSED_EXPERTS,
)
