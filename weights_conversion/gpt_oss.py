"""gpt-oss (arXiv 2508.10925): sinks, windows in every other layer, biases everywhere, clamped SwiGLU; experts stored whole with
inputs first and gate and up in turn, on the hub in blocks of mxfp4 with outputs first."""

from __future__ import annotations

from typing import Any

from hooked_moe.config import ClampedSwiGLU, HookedMoEConfig
from weights_conversion import common
from weights_conversion.common import HF, OURS
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Where a config says nothing of it."""


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    if all(hf.values.get(key) is None for key in ("rope_parameters", "rope_scaling")):
        hf = HFConfig({**hf.values, "rope_parameters": _ROPE}, hf.source)
    biased = hf.boolean("attention_bias", default=True)
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=131072, eps=1e-5, rotary_base=150_000.0, n_key_value_heads=8, windows=True),
        **_read_windows(hf),
        d_head=hf.integer("head_dim", default=64),
        qkv_bias=biased,
        output_bias=biased,
        attention_sink=True,
        num_experts=hf.integer("num_local_experts", "num_experts"),
        d_expert=hf.integer("intermediate_size"),
        router_bias=True,
        norm_topk_prob=True,  # a softmax over the chosen logits is that over all, rescaled
        expert_bias=True,
        clamped_swiglu=ClampedSwiGLU(
            limit=hf.number("swiglu_limit", default=7.0), alpha=hf.number("swiglu_alpha", default=1.702)
        ),
    )


def _read_windows(hf: HFConfig) -> dict[str, Any]:
    """In the layers of that type, or in every other one from the first."""
    chosen = common.layers_of_type(hf, "sliding_attention")
    window = hf.integer("sliding_window", default=None if hf.states_null("sliding_window") else 128)
    return common.windowed(range(0, hf.integer("num_hidden_layers"), 2) if chosen is None else chosen, window)


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    clamp, values = cfg.clamped_swiglu, common.write_all(cfg, "GptOssForCausalLM")
    return values | {
        "rope_scaling": values["rope_scaling"] or {"rope_type": "default"},
        "head_dim": cfg.d_head,
        "attention_bias": cfg.qkv_bias,
        "sliding_window": cfg.sliding_window or 128,  # transformers wants one, also where no layer has it
        "layer_types": common.layer_types(cfg),
        "num_local_experts": cfg.num_experts,
        "intermediate_size": cfg.d_expert,
        "swiglu_limit": None if clamp is None else clamp.limit,
        "swiglu_alpha": None if clamp is None else clamp.alpha,
    }


_EXPERTS, _W_IN, _W_OUT = HF + "mlp.experts.", OURS + "mlp.experts.W_in", OURS + "mlp.experts.W_out"
_ALL_OF_IN = "expert two d_expert d_model"

GPT_OSS = Conversion(
    model_type="gpt_oss",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *common.EMBEDDINGS_AND_NORMS,
        *common.ATTENTION,
        Weight(HF + "self_attn.sinks", OURS + "attn.sink", "head"),
        Weight(HF + "mlp.router.weight", OURS + "mlp.router.W", "expert d_model"),
        Weight(HF + "mlp.router.bias", OURS + "mlp.router.b_logits", "expert"),
        Weight(_EXPERTS + "gate_up_proj", _W_IN, "expert d_model (d_expert two)", _ALL_OF_IN),
        Weight(_EXPERTS + "gate_up_proj_bias", OURS + "mlp.experts.b_in", "expert (d_expert two)", "expert two d_expert"),
        Weight(_EXPERTS + "down_proj", _W_OUT, "expert d_expert d_model", "expert d_model d_expert"),
        Weight(_EXPERTS + "down_proj_bias", OURS + "mlp.experts.b_out", "expert d_model"),
    ),
    alternatives=(
        Weight(_EXPERTS + "gate_up_proj_blocks", _W_IN, "expert (d_expert two) d_model", _ALL_OF_IN),
        Weight(_EXPERTS + "down_proj_blocks", _W_OUT, "expert d_model d_expert"),
    ),
)
