"""Mixtral (arXiv 2401.04088): two of eight large experts, their weights always rescaled to sum to one."""

from __future__ import annotations

from typing import Any

from hooked_moe.config import HookedMoEConfig
from weights_conversion import common
from weights_conversion.common import HF, OURS
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have. The router's jitter acts in training only: left out."""
    return HookedMoEConfig(
        **common.read_all(hf, n_ctx=131072, eps=1e-5, rotary_base=1_000_000.0, n_key_value_heads=8, windows=True),
        **_read_window(hf),
        d_head=common.head_width(hf),
        num_experts=hf.integer("num_local_experts", "num_experts"),
        d_expert=hf.integer("intermediate_size"),
        norm_topk_prob=True,
    )


def _read_window(hf: HFConfig) -> dict[str, Any]:
    """In all layers or in none."""
    window = hf.integer("sliding_window", default=None) if hf.boolean("use_sliding_window", default=True) else None
    return common.windowed(range(hf.integer("num_hidden_layers")), window)


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    """The values of config.json."""
    return common.write_all(cfg, "MixtralForCausalLM") | {
        "head_dim": cfg.d_head,
        "num_local_experts": cfg.num_experts,
        "intermediate_size": cfg.d_expert,
        "sliding_window": cfg.sliding_window,
    }


_EXPERT = HF + "block_sparse_moe.experts.{expert}."

MIXTRAL = Conversion(
    model_type="mixtral",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *common.EMBEDDINGS_AND_NORMS,
        *common.ATTENTION,
        Weight(HF + "block_sparse_moe.gate.weight", OURS + "mlp.router.W", "expert d_model"),
        Weight(_EXPERT + "w1.weight", OURS + "mlp.experts.W_in[{expert}, 0]", "d_expert d_model"),
        Weight(_EXPERT + "w3.weight", OURS + "mlp.experts.W_in[{expert}, 1]", "d_expert d_model"),
        Weight(_EXPERT + "w2.weight", OURS + "mlp.experts.W_out[{expert}]", "d_model d_expert"),
    ),
    alternatives=(Weight(HF + "mlp.gate.weight", OURS + "mlp.router.W", "expert d_model"), *common.FUSED_EXPERTS),
)
