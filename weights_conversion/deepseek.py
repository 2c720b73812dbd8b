"""What families took over from DeepSeek: latent attention (V2, arXiv 2405.04434), and V3's router with its experts
(arXiv 2412.19437, section 2.1): sigmoid scores, a bias for the selection, shared experts without a gate, dense first layers."""

from __future__ import annotations

from typing import Any

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.common import HF, OURS
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight

_ATTN = HF + "self_attn."

LATENT_ATTENTION = (
    Weight(_ATTN + "q_a_proj.weight", OURS + "attn.W_DQ", "q_lora_rank d_model"),
    Weight(_ATTN + "q_a_layernorm.weight", OURS + "attn.q_norm.w", "q_lora_rank"),
    Weight(_ATTN + "q_b_proj.weight", OURS + "attn.W_Q", "(head d_head) q_lora_rank", when=lambda cfg: bool(cfg.q_lora_rank)),
    Weight(_ATTN + "q_proj.weight", OURS + "attn.W_Q", "(head d_head) d_model", when=lambda cfg: not cfg.q_lora_rank),
    Weight(_ATTN + "kv_a_proj_with_mqa.weight", OURS + "attn.W_DKV", "kv_lora_rank+d_rotary d_model"),
    Weight(_ATTN + "kv_a_layernorm.weight", OURS + "attn.kv_norm.w", "kv_lora_rank"),
    Weight(_ATTN + "kv_b_proj.weight", OURS + "attn.W_UKV", "(head content+d_value) kv_lora_rank"),
    Weight(_ATTN + "o_proj.weight", OURS + "attn.W_O", "d_model (head d_value)"),
)
SHARED_EXPERTS = common.gated_mlp(HF + "mlp.shared_experts", OURS + "mlp.shared", "d_shared")
EXPERTS = (
    *common.EXPERTS,
    Weight(HF + "mlp.gate.e_score_correction_bias", OURS + "mlp.router.b_selection", "expert"),
    *SHARED_EXPERTS,
    *common.DENSE_MLP,
)


def read_latent_attention(hf: HFConfig) -> dict[str, Any]:
    """Widths and ranks. Raises `CheckpointError` for biases, and for fewer keys than queries."""
    hf.refuse("attention_bias", (False,), "projections have no biases here")
    hf.refuse("index_topk", (), "learned sparse attention is not here")
    n_heads = hf.integer("num_attention_heads")
    hf.refuse("num_key_value_heads", (n_heads,), f"latent attention makes keys and values for every head: expected {n_heads}")
    return {
        "rotary_interleaved": hf.boolean("rope_interleave", default=True),
        "d_head": hf.integer("qk_nope_head_dim") + hf.integer("qk_rope_head_dim"),
        "d_rotary": hf.integer("qk_rope_head_dim"),
        "d_value": hf.integer("v_head_dim"),
        "kv_lora_rank": hf.integer("kv_lora_rank"),
        "q_lora_rank": None if hf.states_null("q_lora_rank") else hf.integer("q_lora_rank"),
    }


def write_latent_attention(cfg: HookedMoEConfig) -> dict[str, object]:
    """The same, for config.json."""
    return {
        "qk_nope_head_dim": cfg.d_head - cfg.rotary_width,
        "qk_rope_head_dim": cfg.rotary_width,
        "head_dim": cfg.rotary_width,
        "v_head_dim": cfg.value_width,
        "kv_lora_rank": cfg.kv_lora_rank,
        "q_lora_rank": cfg.q_lora_rank,
        "attention_bias": False,
    }


def read_experts(hf: HFConfig, *, n_group: int, topk_group: int, scale: float) -> dict[str, Any]:
    """V3's router and experts, but for which layers are dense. The arguments are the family's defaults."""
    hf.refuse("scoring_func", ("sigmoid",), "the router of this family is a sigmoid")
    hf.refuse("topk_method", ("noaux_tc",), "experts are selected by score and bias in this family")
    hf.refuse("moe_layer_freq", (1,), "every layer after the dense ones has experts")
    d_expert = hf.integer("moe_intermediate_size")
    return {
        "num_experts": hf.integer("n_routed_experts"),
        "d_expert": d_expert,
        "d_shared": hf.integer("n_shared_experts", default=1) * d_expert or None,
        "router_score": "sigmoid",
        "selection_bias": True,
        "group_score": "top2",
        "n_expert_groups": hf.integer("n_group", default=n_group),
        "groups_per_token": hf.integer("topk_group", default=topk_group),
        "norm_topk_prob": hf.boolean("norm_topk_prob", default=True),
        "routed_scaling_factor": hf.number("routed_scaling_factor", default=scale),
    }


def write_experts(cfg: HookedMoEConfig) -> dict[str, object]:
    """The same, for config.json."""
    return {
        "n_routed_experts": cfg.num_experts,
        "n_shared_experts": (cfg.d_shared or 0) // cfg.d_expert,
        "moe_intermediate_size": cfg.d_expert,
        "intermediate_size": cfg.d_mlp or cfg.d_shared or cfg.d_expert,  # not read without dense layers
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": cfg.n_expert_groups,
        "topk_group": cfg.groups_per_token,
        "norm_topk_prob": cfg.norm_topk_prob,
        "routed_scaling_factor": cfg.routed_scaling_factor,
        "num_nextn_predict_layers": 0,
    }


def dense(hf: HFConfig, layers: int | list[int]) -> dict[str, Any]:
    """Which layers are dense, the first so many or those of a list, and how wide."""
    chosen = tuple(range(min(layers, hf.layers()))) if isinstance(layers, int) else tuple(layers)
    return {"dense_layers": chosen, "d_mlp": hf.integer("intermediate_size") if chosen else None}
