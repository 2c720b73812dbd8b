"""OLMoE (arXiv 2409.02060): every layer a mixture of experts, no shared expert; norms over the full width of q and of k."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig

# Here and in the other families: which keys have defaults, and what they are, follows transformers' config class.


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    width = hf.integer("hidden_size") // max(1, hf.integer("num_attention_heads"))
    hf.refuse("head_dim", (width,), f"OLMoE's heads have hidden_size / num_attention_heads = {width}")
    bias = hf.boolean("attention_bias", default=False)
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=4096, eps=1e-5, rotary_base=10_000.0),
        d_head=common.head_width(hf),
        qk_norm="full",
        clip_qkv=hf.number("clip_qkv", default=None),
        qkv_bias=bias,
        output_bias=bias,
        num_experts=hf.integer("num_experts", "num_local_experts"),
        d_expert=hf.integer("intermediate_size"),
        norm_topk_prob=hf.boolean("norm_topk_prob", default=False),
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    return common.write_all(cfg, "OlmoeForCausalLM") | {
        "intermediate_size": cfg.d_expert,
        "attention_bias": cfg.qkv_bias,
        "clip_qkv": cfg.clip_qkv,
        "num_experts": cfg.num_experts,
        "norm_topk_prob": cfg.norm_topk_prob,
    }


OLMOE = Conversion(
    model_type="olmoe",
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *common.ATTENTION, *common.EXPERTS),
    alternatives=common.FUSED_EXPERTS,
)
