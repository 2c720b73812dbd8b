"""OLMoE (arXiv 2409.02060): every layer a mixture of experts, no shared expert; norms over the full width of q and of k."""

from __future__ import annotations

from hooked_moe.config import HookedMoEConfig
from weights_conversion.conversion import Conversion
from weights_conversion.hf_config import HFConfig, rotary_base_entries
from weights_conversion.weight_map import Weight

# Which keys have defaults, and what they are, follows transformers' OlmoeConfig; sizes must be stated.


def read_config(hf: HFConfig) -> HookedMoEConfig:
    """Raises `CheckpointError` for options that the model does not have."""
    hf.refuse_unsupported()
    d_model, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    if n_heads < 1 or d_model % n_heads:
        raise hf.error(f"hidden_size ({d_model}) must be a multiple of num_attention_heads ({n_heads})")
    hf.refuse("head_dim", (d_model // n_heads,), f"OLMoE's heads have hidden_size / num_attention_heads = {d_model // n_heads}")
    return HookedMoEConfig(
        model_type="olmoe",
        n_layers=hf.integer("num_hidden_layers"),
        d_model=d_model,
        d_vocab=hf.integer("vocab_size"),
        n_ctx=hf.integer("max_position_embeddings", default=4096),
        n_heads=n_heads,
        n_key_value_heads=hf.integer("num_key_value_heads", default=n_heads),
        d_head=d_model // n_heads,
        rotary_base=hf.rotary_base(default=10_000.0),
        qk_norm="full",
        clip_qkv=hf.number("clip_qkv", default=None),
        attention_bias=hf.boolean("attention_bias", default=False),
        num_experts=hf.integer("num_experts", "num_local_experts"),
        experts_per_token=hf.integer("num_experts_per_tok"),
        d_expert=hf.integer("intermediate_size"),
        norm_topk_prob=hf.boolean("norm_topk_prob", default=False),
        eps=hf.number("rms_norm_eps", default=1e-5),
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=False),
        initializer_range=hf.number("initializer_range", default=0.02),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_id=hf.token_id("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
    )


def write_config(cfg: HookedMoEConfig) -> dict[str, object]:
    dtype = str(cfg.dtype).removeprefix("torch.")
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_expert,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.n_ctx,
        "initializer_range": cfg.initializer_range,
        "rms_norm_eps": cfg.eps,
        **rotary_base_entries(cfg.rotary_base),
        "attention_bias": cfg.attention_bias,
        "attention_dropout": 0.0,
        "clip_qkv": cfg.clip_qkv,
        "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "norm_topk_prob": cfg.norm_topk_prob,
        "output_router_logits": False,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,
        "pad_token_id": cfg.pad_token_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


_HF, _B = "model.layers.{layer}.", "blocks.{layer}."

OLMOE = Conversion(
    model_type="olmoe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        Weight("model.embed_tokens.weight", "embed.W_E", "d_vocab d_model"),
        Weight(_HF + "input_layernorm.weight", _B + "ln1.w", "d_model"),
        Weight(_HF + "self_attn.q_proj.weight", _B + "attn.W_Q", "(head d_head) d_model"),
        Weight(_HF + "self_attn.k_proj.weight", _B + "attn.W_K", "(kv_head d_head) d_model"),
        Weight(_HF + "self_attn.v_proj.weight", _B + "attn.W_V", "(kv_head d_head) d_model"),
        Weight(_HF + "self_attn.o_proj.weight", _B + "attn.W_O", "d_model (head d_head)"),
        Weight(_HF + "self_attn.q_proj.bias", _B + "attn.b_Q", "(head d_head)"),
        Weight(_HF + "self_attn.k_proj.bias", _B + "attn.b_K", "(kv_head d_head)"),
        Weight(_HF + "self_attn.v_proj.bias", _B + "attn.b_V", "(kv_head d_head)"),
        Weight(_HF + "self_attn.o_proj.bias", _B + "attn.b_O", "d_model"),
        Weight(_HF + "self_attn.q_norm.weight", _B + "attn.q_norm.w", "head*d_head"),
        Weight(_HF + "self_attn.k_norm.weight", _B + "attn.k_norm.w", "kv_head*d_head"),
        Weight(_HF + "post_attention_layernorm.weight", _B + "ln2.w", "d_model"),
        Weight(_HF + "mlp.gate.weight", _B + "mlp.router.W", "expert d_model"),
        Weight(_HF + "mlp.experts.{expert}.gate_proj.weight", _B + "mlp.experts.W_in[{expert}, 0]", "d_expert d_model"),
        Weight(_HF + "mlp.experts.{expert}.up_proj.weight", _B + "mlp.experts.W_in[{expert}, 1]", "d_expert d_model"),
        Weight(_HF + "mlp.experts.{expert}.down_proj.weight", _B + "mlp.experts.W_out[{expert}]", "d_model d_expert"),
        Weight("model.norm.weight", "ln_final.w", "d_model"),
        Weight("lm_head.weight", "unembed.W_U", "d_vocab d_model"),
    ),
    fused=(
        Weight(_HF + "mlp.experts.gate_up_proj", _B + "mlp.experts.W_in", "expert (two d_expert) d_model"),
        Weight(_HF + "mlp.experts.down_proj", _B + "mlp.experts.W_out", "expert d_model d_expert"),
    ),
)
