"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v; one shared expert behind a sigmoid gate; some layers may be dense."""

from __future__ import annotations

from typing import Any

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.common import HF, OURS
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=32768, eps=1e-6, rotary_base=10_000.0, n_key_value_heads=16, windows=True),
        **_read_windows(hf),
        **common.read_qwen(hf),
        qkv_bias=hf.boolean("qkv_bias", default=True),
        d_shared=hf.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _read_windows(hf: HFConfig) -> dict[str, Any]:
    """In the layers of that type; where the config does not say which, in every other one of the first `max_window_layers`."""
    on = hf.boolean("use_sliding_window", default=False)
    most = min(hf.integer("max_window_layers", default=28), hf.integer("num_hidden_layers"))
    chosen = common.layers_of_type(hf, "sliding_attention")
    if chosen and not on:
        raise hf.error("'sliding_attention' in layer_types contradicts use_sliding_window=False")
    window = hf.integer("sliding_window", default=None if hf.states_null("sliding_window") else 4096) if on else None
    return common.windowed(range(0, most, 2) if chosen is None else chosen, window)


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    own = {
        "qkv_bias": cfg.qkv_bias,
        "shared_expert_intermediate_size": cfg.d_shared,
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "layer_types": common.layer_types(cfg),
    }
    return common.write_all(cfg, "Qwen2MoeForCausalLM") | common.write_qwen(cfg) | own


QWEN2_MOE = Conversion(
    model_type="qwen2_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *common.EMBEDDINGS_AND_NORMS,
        *common.ATTENTION,
        *common.EXPERTS,
        *common.gated_mlp(HF + "mlp.shared_expert", OURS + "mlp.shared", "d_shared"),
        Weight(HF + "mlp.shared_expert_gate.weight", OURS + "mlp.W_shared_gate", "one d_model"),
        *common.DENSE_MLP,
    ),
    alternatives=common.FUSED_EXPERTS,
)
