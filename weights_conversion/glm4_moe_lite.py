"""GLM-4.7-Flash: latent attention and experts as in DeepSeek-V3, and a list that says which layers are dense. Layers for
multi-token prediction are left out."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common, deepseek
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=202752, eps=1e-5, rotary_base=10_000.0, split_temperature=True),
        **deepseek.read_latent_attention(hf),
        **deepseek.read_experts(hf, n_group=1, topk_group=1, scale=1.8),
        **deepseek.dense(hf, _dense_layers(hf)),
    )


def _dense_layers(hf: HFConfig) -> list[int]:
    """By the list, or the first layer. transformers does not read `first_k_dense_replace`, so it may say nothing else."""
    layers = common.layers_of_type(hf, "dense", key="mlp_layer_types")
    chosen = [0] if layers is None else layers
    first = (len(chosen),) if chosen == list(range(len(chosen))) else ()
    hf.refuse("first_k_dense_replace", first, f"mlp_layer_types makes layers {chosen} dense")
    return chosen


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    kinds = ["dense" if layer in cfg.dense_layers else "sparse" for layer in range(cfg.n_layers)]
    own = {"mlp_layer_types": kinds, "rope_interleave": cfg.rotary_interleaved}
    shared = deepseek.write_latent_attention(cfg) | deepseek.write_experts(cfg)
    return common.write_all(cfg, "Glm4MoeLiteForCausalLM") | shared | own


GLM4_MOE_LITE = Conversion(
    model_type="glm4_moe_lite",
    read_config=read_config,
    write_config=write_config,
    weights=(*common.EMBEDDINGS_AND_NORMS, *deepseek.LATENT_ATTENTION, *deepseek.EXPERTS),
    alternatives=common.FUSED_EXPERTS,
)
