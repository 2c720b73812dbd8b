"""What the families' checkpoints have in common: tables of weights, and the config values that all of them state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hooked_moe.checks import quoted
from hooked_moe.config import HookedMoEConfig
from weights_conversion.hf_config import HFConfig, rotary_entries
from weights_conversion.weight_map import Weight

HF, OURS = "model.layers.{layer}.", "blocks.{layer}."

EMBEDDINGS_AND_NORMS = (
    Weight("model.embed_tokens.weight", "embed.W_E", "d_vocab d_model"),
    Weight("model.norm.weight", "ln_final.w", "d_model"),
    Weight("lm_head.weight", "unembed.W_U", "d_vocab d_model"),
    Weight(HF + "input_layernorm.weight", OURS + "ln1.w", "d_model"),
    Weight(HF + "post_attention_layernorm.weight", OURS + "ln2.w", "d_model"),
)
ATTENTION = (
    Weight(HF + "self_attn.q_proj.weight", OURS + "attn.W_Q", "(head d_head) d_model"),
    Weight(HF + "self_attn.k_proj.weight", OURS + "attn.W_K", "(kv_head d_head) d_model"),
    Weight(HF + "self_attn.v_proj.weight", OURS + "attn.W_V", "(kv_head d_head) d_model"),
    Weight(HF + "self_attn.o_proj.weight", OURS + "attn.W_O", "d_model (head d_head)"),
    Weight(HF + "self_attn.q_proj.bias", OURS + "attn.b_Q", "(head d_head)"),
    Weight(HF + "self_attn.k_proj.bias", OURS + "attn.b_K", "(kv_head d_head)"),
    Weight(HF + "self_attn.v_proj.bias", OURS + "attn.b_V", "(kv_head d_head)"),
    Weight(HF + "self_attn.o_proj.bias", OURS + "attn.b_O", "d_model"),
    Weight(HF + "self_attn.q_norm.weight", OURS + "attn.q_norm.w", "normed"),
    Weight(HF + "self_attn.k_norm.weight", OURS + "attn.k_norm.w", "normed"),
)
EXPERTS = (
    Weight(HF + "mlp.gate.weight", OURS + "mlp.router.W", "expert d_model"),
    Weight(HF + "mlp.experts.{expert}.gate_proj.weight", OURS + "mlp.experts.W_in[{expert}, 0]", "d_expert d_model"),
    Weight(HF + "mlp.experts.{expert}.up_proj.weight", OURS + "mlp.experts.W_in[{expert}, 1]", "d_expert d_model"),
    Weight(HF + "mlp.experts.{expert}.down_proj.weight", OURS + "mlp.experts.W_out[{expert}]", "d_model d_expert"),
)
FUSED_EXPERTS = (
    Weight(HF + "mlp.experts.gate_up_proj", OURS + "mlp.experts.W_in", "expert (two d_expert) d_model"),
    Weight(HF + "mlp.experts.down_proj", OURS + "mlp.experts.W_out", "expert d_model d_expert"),
)


def gated_mlp(hf: str, ours: str, width: str) -> tuple[Weight, ...]:
    """The three weights of a `GatedMLP`."""
    return (
        Weight(f"{hf}.gate_proj.weight", f"{ours}.W_gate", f"{width} d_model"),
        Weight(f"{hf}.up_proj.weight", f"{ours}.W_in", f"{width} d_model"),
        Weight(f"{hf}.down_proj.weight", f"{ours}.W_out", f"d_model {width}"),
    )


DENSE_MLP = gated_mlp(HF + "mlp", OURS + "mlp", "d_mlp")


def read_all(
    hf: HFConfig,
    *,
    n_ctx: int,
    eps: float,
    rotary_base: float,
    n_key_value_heads: int | None = None,
    windows: bool = False,
    split_temperature: bool = False,
    rotated_part: float | None = None,
) -> dict[str, Any]:
    """What every family states under the same keys. The arguments are the family's defaults; sizes must be stated.

    `windows` says whether the family may have sliding windows; for `split_temperature` and `rotated_part` see `HFConfig.rotary`.
    Raises `CheckpointError` for options that no family here has.
    """
    hf.refuse_unsupported()
    if not windows:
        hf.refuse_windows()
    n_heads = hf.integer("num_attention_heads")
    return hf.rotary(rotary_base, split_temperature, rotated_part) | {
        "n_layers": hf.layers(),
        "d_model": hf.integer("hidden_size"),
        "d_vocab": hf.integer("vocab_size"),
        "n_ctx": hf.integer("max_position_embeddings", default=n_ctx),
        "n_heads": n_heads,
        "n_key_value_heads": hf.integer("num_key_value_heads", default=n_key_value_heads or n_heads),
        "experts_per_token": hf.integer("num_experts_per_tok"),
        "eps": hf.number("rms_norm_eps", default=eps),
        "tie_word_embeddings": hf.boolean("tie_word_embeddings", default=False),
        "initializer_range": hf.number("initializer_range", default=0.02),
        "bos_token_id": hf.integer("bos_token_id", default=None),
        "eos_token_id": hf.end_tokens("eos_token_id"),
        "pad_token_id": hf.integer("pad_token_id", default=None),
    }


def write_all(cfg: HookedMoEConfig, architecture: str) -> dict[str, object]:
    """The same, for config.json."""
    dtype = str(cfg.dtype).removeprefix("torch.")
    return {
        "architectures": [architecture],
        "model_type": cfg.model_type,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "num_experts_per_tok": cfg.experts_per_token,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.n_ctx,
        "initializer_range": cfg.initializer_range,
        "rms_norm_eps": cfg.eps,
        **rotary_entries(cfg.rotary_base, cfg.rotary_scaling),
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(cfg.end_tokens) if len(cfg.end_tokens) > 1 else next(iter(cfg.end_tokens), None),
        "pad_token_id": cfg.pad_token_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def head_width(hf: HFConfig) -> int:
    """`head_dim` where it is stated, or else the model's width shared out among the heads."""
    d_model, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    stated: int | None = hf.integer("head_dim", default=None)
    if stated is None and (n_heads < 1 or d_model % n_heads):
        raise hf.error(f"hidden_size ({d_model}) must be a multiple of num_attention_heads ({n_heads})")
    return d_model // n_heads if stated is None else stated


def read_qwen(hf: HFConfig) -> dict[str, Any]:
    """What Qwen's configs state alike: the experts, and which layers are dense."""
    n_layers, step = hf.layers(), hf.integer("decoder_sparse_step", default=1)
    only = set(hf.integers("mlp_only_layers", default=[]))
    if step < 1:
        raise hf.error(f"decoder_sparse_step must be at least 1, not {step}")
    dense = tuple(layer for layer in range(n_layers) if layer in only or (layer + 1) % step)
    return {
        "d_head": head_width(hf),
        "num_experts": hf.integer("num_experts", "num_local_experts"),
        "d_expert": hf.integer("moe_intermediate_size"),
        "norm_topk_prob": hf.boolean("norm_topk_prob", default=False),
        "dense_layers": dense,
        "d_mlp": hf.integer("intermediate_size") if dense else None,
    }


def write_qwen(cfg: HookedMoEConfig) -> dict[str, object]:
    """The same, for config.json."""
    return {
        "head_dim": cfg.d_head,
        "num_experts": cfg.num_experts,
        "moe_intermediate_size": cfg.d_expert,
        "norm_topk_prob": cfg.norm_topk_prob,
        "mlp_only_layers": list(cfg.dense_layers),
        "decoder_sparse_step": 1,
        "intermediate_size": cfg.d_mlp or cfg.d_shared or cfg.d_expert,  # not read without dense layers
    }


def windowed(layers: Iterable[int], window: int | None) -> dict[str, Any]:
    """The layers that have a window, and its width."""
    chosen = tuple(layers) if window else ()
    return {"windowed_layers": chosen, "sliding_window": window if chosen else None}


def layer_types(cfg: HookedMoEConfig) -> list[str]:
    """`layer_types` in config.json."""
    return ["full_attention" if cfg.window_of(layer) is None else "sliding_attention" for layer in range(cfg.n_layers)]


def layers_of_type(hf: HFConfig, kind: str, key: str = "layer_types") -> list[int] | None:
    """The layers that the config says are of this kind; None where it does not say."""
    kinds = hf.values.get(key)
    if kinds is None:
        return None
    n_layers = hf.integer("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise hf.error(f"{key} must be a list of {n_layers} kinds, one a layer, not {quoted(kinds)}")
    return [layer for layer, found in enumerate(kinds) if found == kind]
