"""DeepSeek-V2 (arXiv 2405.04434): latent attention, dense first layers, shared experts without a gate, scaled routing weights."""

from __future__ import annotations

from typing import Any

from hooked_moe.checks import quoted
from hooked_moe.config import HookedMoEConfig
from weights_conversion import common, deepseek
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    hf.refuse("mlp_bias", (False,), "projections have no biases here")
    hf.refuse("rope_interleave", (True,), "neighbouring coordinates turn together in this family")
    hf.refuse("moe_layer_freq", (1,), "every layer after the dense ones has experts")
    hf.refuse("scoring_func", ("softmax",), "the router is a softmax")
    hf.refuse("norm_topk_prob", (False,), "transformers and the original code disagree on what it means in this family")
    d_expert = hf.integer("moe_intermediate_size")
    shared = 0 if hf.states_null("n_shared_experts") else hf.integer("n_shared_experts", default=2)
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=2048, eps=1e-6, rotary_base=10_000.0, split_temperature=True),
        **deepseek.read_latent_attention(hf),
        **_read_groups(hf),
        **deepseek.dense(hf, hf.integer("first_k_dense_replace", default=0)),
        num_experts=hf.integer("n_routed_experts", "num_experts"),
        d_expert=d_expert,
        routed_scaling_factor=hf.number("routed_scaling_factor", default=1.0),
        d_shared=shared * d_expert or None,
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
    latent = deepseek.write_latent_attention(cfg)
    return (
        common.write_all(cfg, "DeepseekV2ForCausalLM")
        | latent
        | {
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
    )


DEEPSEEK_V2 = Conversion(
    model_type="deepseek_v2",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *common.EMBEDDINGS_AND_NORMS,
        *deepseek.LATENT_ATTENTION,
        *common.EXPERTS,
        *deepseek.SHARED_EXPERTS,
        *common.DENSE_MLP,
    ),
    alternatives=common.FUSED_EXPERTS,
)
