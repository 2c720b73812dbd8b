"""GLM-4.5, 4.6 and 4.7 (arXiv 2508.06471): grouped queries with biases, a part of each head rotated, in some models norms of
every head; experts as in DeepSeek-V3. Layers for multi-token prediction are left out."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common, deepseek
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    values = common.read_all(hf, n_ctx=131072, eps=1e-5, rotary_base=10_000.0, n_key_value_heads=8, rotated_part=0.5)
    d_head = common.head_width(hf)
    rotated = int(d_head * values.pop("partial_rotary_factor"))
    return HookedMoEConfig(
        **values,
        **deepseek.read_experts(hf, n_group=1, topk_group=1, scale=1.0),
        **deepseek.dense(hf, hf.integer("first_k_dense_replace", default=1)),
        d_head=d_head,
        d_rotary=None if rotated == d_head else rotated,
        qk_norm="head" if hf.boolean("use_qk_norm", default=False) else None,
        qkv_bias=hf.boolean("attention_bias", default=False),
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    values, part = common.write_all(cfg, "Glm4MoeForCausalLM"), {"partial_rotary_factor": cfg.rotary_width / cfg.d_head}
    assert isinstance(values["rope_parameters"], dict)
    own = part | {
        "rope_parameters": values["rope_parameters"] | part,
        "head_dim": cfg.d_head,
        "use_qk_norm": cfg.qk_norm is not None,
        "attention_bias": cfg.qkv_bias,
        "first_k_dense_replace": len(cfg.dense_layers),
    }
    return values | deepseek.write_experts(cfg) | own


GLM4_MOE = Conversion(
    model_type="glm4_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *common.ATTENTION, *deepseek.EXPERTS),
    alternatives=common.FUSED_EXPERTS,
)
