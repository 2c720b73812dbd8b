"""Small random OLMoE models of transformers, with the options of their configs that a reimplementation could get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

VOCABULARY = 97
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "clipped": {"clip_qkv": 0.4},
    "renormalised": {"norm_topk_prob": True},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 0.3},
    "rope-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "all-at-once": {
        "num_key_value_heads": 1,
        "clip_qkv": 0.6,
        "norm_topk_prob": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.03,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "num_experts_per_tok": 5,
    },
}
"""Configs by a name for test ids. Each option changes the logits of these models by far more than the tolerance of parity."""


def tiny_olmoe(**options: Any) -> OlmoeForCausalLM:
    """A reference model in float32: eager attention and eager experts, randomised weights.

    Norms and biases are random too: those that transformers starts with, ones and zeros, would hide errors.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = OlmoeConfig(**(sizes | options))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = OlmoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model


def save(model: OlmoeForCausalLM, directory: Path, *, fused: bool = False, sharded: bool = False) -> Path:
    """Save as transformers does: experts one by one or fused into one tensor a layer, in one file or several with an index."""
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size="60KB" if sharded else "5GB")
    return directory


def random_tokens(batch: int = 3, pos: int = 20) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, pos), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a model of transformers or of ours."""
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits
