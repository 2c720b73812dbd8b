"""DeepSeek-V3 and R1 (arXiv 2412.19437), Moonlight (arXiv 2502.16982), Kimi-K2 (arXiv 2507.20534): latent attention, and experts
selected by sigmoid scores and a bias. Layers for multi-token prediction are left out."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common, deepseek
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=4096, eps=1e-6, rotary_base=10_000.0, split_temperature=True),
        **deepseek.read_latent_attention(hf),
        **deepseek.read_experts(hf, n_group=8, topk_group=4, scale=2.5),
        **deepseek.dense(hf, hf.integer("first_k_dense_replace", default=3)),
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    own = {"first_k_dense_replace": len(cfg.dense_layers), "rope_interleave": cfg.rotary_interleaved}
    shared = deepseek.write_latent_attention(cfg) | deepseek.write_experts(cfg)
    return common.write_all(cfg, "DeepseekV3ForCausalLM") | shared | own


DEEPSEEK_V3 = Conversion(
    model_type="deepseek_v3",
    aliases=("kimi_k2",),
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *deepseek.LATENT_ATTENTION, *deepseek.EXPERTS),
    alternatives=common.FUSED_EXPERTS,
)
