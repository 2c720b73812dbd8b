"""Small random models of transformers, with the options of their configs that a reimplementation could get wrong, and ours."""

from __future__ import annotations

import copy
import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import OlmoeForCausalLM, PreTrainedConfig, PreTrainedModel

from hooked_moe import HookedMoE

Options = dict[str, Any]
VOCABULARY = 97


def rope(base: float, **scaling: Any) -> Options:
    """Rotary positions; `scaling` of them by YaRN, whose ramp then covers some of the pairs, with plain ones on both sides."""
    rope_type = "yarn" if scaling else "default"
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": base} | scaling}


YARN = {"factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 8.0, "beta_slow": 2.0}
COMMON: Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TIED: Options = {"tie_word_embeddings": True}
EPS: Options = {"rms_norm_eps": 0.3}

OPTIONS: dict[str, Options] = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "clipped": {"clip_qkv": 0.4},
    "renormalised": {"norm_topk_prob": True},
    "biased": {"attention_bias": True},
    "tied": TIED,
    "eps": EPS,
    "rope-base": rope(50.0),
    "all-at-once": {
        "num_key_value_heads": 1,
        "clip_qkv": 0.6,
        "norm_topk_prob": True,
        "attention_bias": True,
        "rms_norm_eps": 0.03,
        "num_experts_per_tok": 5,
    }
    | TIED
    | rope(300.0),
}
"""Configs of OLMoE by a name for test ids. Each option changes the logits by far more than the tolerance of parity."""

OLMOE = OPTIONS | {
    "one-key-value-head": {"num_key_value_heads": 1},
    "rope-base-1e6": rope(1e6),
    "yarn": rope(100.0, **YARN),
}
QWEN2_MOE: dict[str, Options] = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "one-key-value-head": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 24},
    "unbiased": {"qkv_bias": False},
    "renormalised": {"norm_topk_prob": True},
    "dense-layers-by-list": {"mlp_only_layers": [1]},
    "dense-layers-by-step": {"decoder_sparse_step": 2},
    "windows-by-number": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "windows-by-list": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "tied": TIED,
    "eps": EPS,
    "rope-base": rope(50.0),
    "yarn": rope(100.0, **YARN),
    "all-at-once": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rms_norm_eps": 0.03,
        "num_experts_per_tok": 5,
    }
    | TIED
    | rope(300.0, **YARN),
}
DEEPSEEK_V2: dict[str, Options] = {
    "plain": {},
    "latent-queries": {"q_lora_rank": 20},
    "values-as-wide-as-keys": {"v_head_dim": 16},
    "values-wider-than-keys": {"v_head_dim": 24},
    "no-dense-layer": {"first_k_dense_replace": 0},
    "two-dense-layers": {"first_k_dense_replace": 2},
    "one-shared-expert": {"n_shared_experts": 1},
    "scaled-routing": {"routed_scaling_factor": 2.5},
    "group-limited": {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2},
    "tied": TIED,
    "eps": EPS,
    "rope-base": rope(50.0),
    "yarn": rope(100.0, **YARN, mscale=0.707, mscale_all_dim=0.707),
    "yarn-in-scores-and-rotations": rope(100.0, **YARN, mscale=2.0, mscale_all_dim=0.5),
    "yarn-in-rotations": rope(100.0, **YARN),
    "all-at-once": {
        "q_lora_rank": 20,
        "v_head_dim": 10,
        "first_k_dense_replace": 1,
        "n_shared_experts": 3,
        "routed_scaling_factor": 1.5,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 5,
        "rms_norm_eps": 0.03,
    }
    | TIED
    | rope(300.0, **YARN, mscale=0.5, mscale_all_dim=2.0),
}
QWEN3_MOE: dict[str, Options] = {
    "plain": {},
    "key-value-head-per-head": {"num_key_value_heads": 4},
    "one-key-value-head": {"num_key_value_heads": 1},
    "narrow-heads": {"head_dim": 8},
    "not-renormalised": {"norm_topk_prob": False},
    "biased": {"attention_bias": True},
    "window": {"use_sliding_window": True, "sliding_window": 6},
    "dense-layers-by-list": {"mlp_only_layers": [1]},
    "dense-layers-by-step": {"decoder_sparse_step": 2},
    "tied": TIED,
    "eps": EPS,
    "rope-base": rope(50.0),
    "yarn": rope(100.0, **YARN),
    "all-at-once": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "norm_topk_prob": False,
        "attention_bias": True,
        "mlp_only_layers": [2],
        "rms_norm_eps": 0.03,
        "num_experts_per_tok": 5,
    }
    | TIED
    | rope(300.0, **YARN),
}
MIXTRAL: dict[str, Options] = {
    "plain": {},
    "key-value-head-per-head": {"num_key_value_heads": 4},
    "one-key-value-head": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 24},
    "two-experts-a-token": {"num_experts_per_tok": 2},
    "tied": TIED,
    "eps": EPS,
    "rope-base": rope(50.0),
    "yarn": {"head_dim": 16} | rope(100.0, **YARN),  # transformers wants the width stated here
    "all-at-once": {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 0.03, "num_experts_per_tok": 5, "sliding_window": 3}
    | TIED
    | rope(300.0, **YARN),
}


LATENT_HEADS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 24, "v_head_dim": 12}
SIGMOID: dict[str, Options] = {
    "plain": {},
    "not-renormalised": {"norm_topk_prob": False},
    "groups": {"n_group": 5, "topk_group": 2, "routed_scaling_factor": 1.5},
    "eps": EPS,
}
"""What the families that took over DeepSeek-V3's router have in common."""
MANY: Options = {
    "rms_norm_eps": 0.03,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 3,
    "routed_scaling_factor": 0.7,
} | TIED
DEEPSEEK_V3 = SIGMOID | {
    "latent-queries": {"q_lora_rank": 20, "first_k_dense_replace": 0},
    "halves-rotated": {"rope_interleave": False},
    "yarn": rope(100.0, **YARN, mscale=1.0, mscale_all_dim=1.0),
    "yarn-with-a-step": rope(100.0, **YARN | {"beta_fast": 4.0, "beta_slow": 4.0}, mscale=1.0, mscale_all_dim=1.0),
    "all-at-once": MANY | {"q_lora_rank": 20, "v_head_dim": 10} | rope(300.0, **YARN, mscale=0.5, mscale_all_dim=2.0),
}
GLM4_MOE = SIGMOID | {
    "key-and-query-norms": {"use_qk_norm": True},
    "whole-heads-rotated": {"partial_rotary_factor": 1.0, "attention_bias": False},
    "all-at-once": MANY
    | {"use_qk_norm": True, "num_key_value_heads": 1, "head_dim": 24, "first_k_dense_replace": 2, "partial_rotary_factor": 0.75}
    | rope(300.0),
}
GLM4_MOE_LITE = SIGMOID | {
    "straight-queries": {"q_lora_rank": None, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    "all-at-once": MANY | {"mlp_layer_types": ["sparse", "dense", "sparse"], "rope_interleave": False} | rope(300.0),
}
GPT_OSS: dict[str, Options] = {
    "plain": {},
    "unbiased": {"attention_bias": False},
    "windows-by-list": {"sliding_window": 2, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "tight-clamp": {"swiglu_limit": 0.5, "swiglu_alpha": 1.0},
    "rope-without-yarn": rope(100.0) | {"layer_types": ["full_attention"] * 3},
    "eps": EPS,
    "all-at-once": {
        "num_key_value_heads": 1,
        "head_dim": 24,
        "sliding_window": 3,
        "swiglu_limit": 1.0,
        "swiglu_alpha": 1.2,
        "rms_norm_eps": 0.03,
        "num_experts_per_tok": 5,
    }
    | TIED
    | rope(300.0, **YARN),
}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: its classes, the sizes of its tiny models, and options by a name for test ids."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    sizes: Options
    options: dict[str, Options]
    count: str = "num_experts"
    """The key of the number of experts."""

    def tiny_config(self, **options: Any) -> PreTrainedConfig:
        values = COMMON | self.sizes | options
        values[self.count] = values.pop("num_experts")
        config = self.config(**copy.deepcopy(values))  # which writes into what it is given
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        return config

    def tiny(self, **options: Any) -> PreTrainedModel:
        """A reference model in float32: eager attention and eager experts, randomised weights.

        Norms and biases are random too: those that transformers starts with, ones and zeros, would hide errors. The bias of the
        selection is large beside the scores and negative, so that what is not chosen must be lower than any choice.
        """
        model = self.model(self.tiny_config(**options)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter.copy_(1 + 0.3 * noise)
                else:
                    parameter.copy_((1.0 if "sinks" in name else 0.1) * noise)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator) - 1.5)
        return model


FAMILIES: dict[str, Family] = {
    "olmoe": Family(
        transformers.OlmoeConfig,
        OlmoeForCausalLM,
        {"num_key_value_heads": 4, "intermediate_size": 24},
        OLMOE,
    ),
    "qwen2_moe": Family(
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 36,
            "intermediate_size": 40,
            "rms_norm_eps": 1e-6,
        }
        | rope(1e6),
        QWEN2_MOE,
    ),
    "deepseek_v2": Family(
        transformers.DeepseekV2Config,
        transformers.DeepseekV2ForCausalLM,
        {
            "kv_lora_rank": 24,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "intermediate_size": 40,
        },
        DEEPSEEK_V2,
    ),
    "qwen3_moe": Family(
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "norm_topk_prob": True,
        }
        | rope(1e6),
        QWEN3_MOE,
    ),
    "mixtral": Family(
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_key_value_heads": 2, "intermediate_size": 24} | rope(1e6),
        MIXTRAL,
    ),
    "deepseek_v3": Family(
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        LATENT_HEADS
        | {"num_key_value_heads": 4, "q_lora_rank": None, "n_shared_experts": 2, "moe_intermediate_size": 24}
        | {"first_k_dense_replace": 1, "intermediate_size": 40, "n_group": 1, "topk_group": 1}
        | rope(5e4),
        DEEPSEEK_V3,
        count="n_routed_experts",
    ),
    "glm4_moe": Family(
        transformers.Glm4MoeConfig,
        transformers.Glm4MoeForCausalLM,
        {"num_key_value_heads": 2, "attention_bias": True, "moe_intermediate_size": 24, "intermediate_size": 40} | rope(1e6),
        GLM4_MOE,
        count="n_routed_experts",
    ),
    "glm4_moe_lite": Family(
        transformers.Glm4MoeLiteConfig,
        transformers.Glm4MoeLiteForCausalLM,
        LATENT_HEADS
        | {"num_key_value_heads": 4, "q_lora_rank": 20, "moe_intermediate_size": 24, "intermediate_size": 40}
        | rope(1e6),
        GLM4_MOE_LITE,
        count="n_routed_experts",
    ),
    "gpt_oss": Family(
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 24, "sliding_window": 6}
        | rope(100.0, **YARN, truncate=False),
        GPT_OSS,
        count="num_local_experts",
    ),
}
"""By `model_type`. Plain tiny models have the options of the published model of the family, but for YaRN."""

CASES: dict[str, tuple[str, str]] = {
    f"{name}-{option}": (name, option) for name, family in FAMILIES.items() for option in family.options
}
"""Every family with every option, by a name for test ids."""


def tiny(case: str) -> PreTrainedModel:
    """The tiny model of a case."""
    family, option = CASES[case]
    return FAMILIES[family].tiny(**FAMILIES[family].options[option])


def tiny_olmoe(**options: Any) -> OlmoeForCausalLM:
    return FAMILIES["olmoe"].tiny(**options)


def save(model: PreTrainedModel, directory: Path, *, fused: bool = False, sharded: bool = False) -> Path:
    """Save as transformers does: experts one by one or fused into one tensor a layer, in one file or several with an index."""
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size="60KB" if sharded else "5GB")
    return directory


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here."""

    hf: PreTrainedModel
    ours: HookedMoE

    @classmethod
    def of(cls, hf: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Pair:
        with tempfile.TemporaryDirectory() as directory:
            save(hf, Path(directory))
            if dtype != torch.float32:
                eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
                hf = type(hf).from_pretrained(directory, dtype=dtype, **eager).eval()
            return cls(hf, HookedMoE.from_pretrained(directory, dtype=dtype))


@functools.cache
def pair_of(case: str) -> Pair:
    """Shared by all tests, which leave the weights as they are."""
    return Pair.of(tiny(case))


def random_tokens(batch: int = 3, pos: int = 20) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, pos), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a model of transformers or of ours."""
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


# What transformers computes


def reference(hf: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """transformers' output; positions follow the mask, as its `generate` has them."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return hf(tokens, attention_mask=mask, position_ids=positions, use_cache=False, **options)


@contextmanager
def routing_of(pair: Pair, tokens: Tensor) -> Iterator[dict[int, Tensor]]:
    """The experts that transformers selects, by layer, as [batch, pos, slot]."""
    routed: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, out: routed.update({layer: out[2].view(*tokens.shape, -1)})

    routers = {layer: _router(pair.hf.model.layers[layer].mlp) for layer in pair.ours.cfg.moe_layers}
    handles = [router.register_forward_hook(keep(layer)) for layer, router in routers.items()]
    yield routed
    for handle in handles:
        handle.remove()


def _router(moe: torch.nn.Module) -> torch.nn.Module:
    return moe.router if hasattr(moe, "router") else moe.gate


def hf_activations(pair: Pair, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Every activation that has a name here, from what transformers' own modules take in and give out."""
    return _Recorder(pair, tokens).run(tokens, mask)


class _Recorder:
    def __init__(self, pair: Pair, tokens: Tensor) -> None:
        self.cfg, self.hf, self.shape = pair.ours.cfg, pair.hf, tokens.shape
        self.found: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def run(self, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        self.at(self.hf.model.embed_tokens, lambda x, out: {"hook_embed": out})
        for i, layer in enumerate(self.hf.model.layers):
            self.block(f"blocks.{i}.", layer, is_moe=i in self.cfg.moe_layers)
        self.norm("ln_final.", self.hf.model.norm)
        module = sys.modules[type(self.hf).__module__]
        attend = self.recording(module.eager_attention_forward)
        with torch.no_grad(), mock.patch.object(module, "eager_attention_forward", attend):
            reference(self.hf, tokens, mask)
        for handle in self.handles:
            handle.remove()
        return self.found

    def at(self, module: torch.nn.Module, read: Callable[[Tensor, Any], dict[str, Tensor]]) -> None:
        """`read` gives names to what it makes of the module's input and output."""

        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found = read(args[0] if args else kwargs["hidden_states"], output)
            self.found |= {name: x.clone() for name, x in found.items()}

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def rows(self, x: Tensor) -> Tensor:
        """[batch, pos, ...] of [batch * pos, ...], which some modules see."""
        return x.reshape(*self.shape, -1)

    def block(self, b: str, layer: torch.nn.Module, is_moe: bool) -> None:
        self.at(layer, lambda x, out: {b + "hook_resid_pre": x, b + "hook_resid_post": out})
        self.norm(b + "ln1.", layer.input_layernorm)
        self.at(layer.self_attn, lambda x, out: {b + "hook_attn_out": out[0]})
        (self.attention if self.cfg.kv_lora_rank is None else self.latent_attention)(b + "attn.", layer.self_attn)
        self.at(layer.post_attention_layernorm, lambda x, out: {b + "hook_resid_mid": x})
        self.norm(b + "ln2.", layer.post_attention_layernorm)
        self.at(layer.mlp, lambda x, out: {b + "hook_mlp_out": out[0] if isinstance(out, tuple) else out})
        (self.moe if is_moe else self.gated_mlp)(b + "mlp.", layer.mlp)

    def norm(self, name: str, module: torch.nn.Module) -> None:
        def read(x: Tensor, out: Tensor) -> dict[str, Tensor]:
            scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
            return {name + "hook_scale": scale, name + "hook_normalized": out / module.weight}

        self.at(module, read)

    def attention(self, name: str, module: torch.nn.Module) -> None:
        for x in "qkv":
            self.at(getattr(module, f"{x}_proj"), lambda _, out, x=x: {f"{name}hook_{x}": _heads(out, self.cfg.d_head)})
        self.attention_output(name, module)

    def latent_attention(self, name: str, module: torch.nn.Module) -> None:
        cfg, positions = self.cfg, {}

        def keep_position(x: Tensor, down: Tensor) -> dict[str, Tensor]:
            positions["k"] = down[..., cfg.kv_lora_rank :]
            return {}

        def keys_and_values(latent: Tensor, up: Tensor) -> dict[str, Tensor]:
            heads = up.view(*self.shape, cfg.n_heads, -1)
            content, v = heads.split([cfg.d_head - cfg.rotary_width, cfg.value_width], dim=-1)
            position = positions["k"].unsqueeze(2).expand(-1, -1, cfg.n_heads, -1)
            return {name + "hook_k": torch.cat((content, position), dim=-1), name + "hook_v": v}

        queries = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        self.at(queries, lambda x, out: {name + "hook_q": _heads(out, cfg.d_head)})
        self.at(module.kv_a_proj_with_mqa, keep_position)
        self.at(module.kv_a_layernorm, lambda x, out: {name + "hook_kv_latent": self.rows(out)})
        self.at(module.kv_b_proj, keys_and_values)
        self.attention_output(name, module)

    def attention_output(self, name: str, module: torch.nn.Module) -> None:
        def read(x: Tensor, out: Tensor) -> dict[str, Tensor]:
            z, weight = _heads(x, self.cfg.value_width), _heads(module.o_proj.weight, self.cfg.value_width)
            return {name + "hook_z": z, name + "hook_result": torch.einsum("bphv,dhv->bphd", z, weight)}

        self.at(module.o_proj, read)
        if self.cfg.attention_sink:
            self.found[name + "hook_attn_sink"] = module.sinks.detach().expand(*self.shape, -1)

    def recording(self, eager: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """transformers' attention, which also keeps what it is given."""

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **options: Any
        ) -> tuple[Tensor, Tensor]:
            output, pattern = eager(module, query, key, value, attention_mask, scaling, **options)
            scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scaling
            name = f"blocks.{module.layer_idx}.attn.hook_"
            query, key = self.as_pairs(query), self.as_pairs(key)
            self.found |= {name + "rot_q": query.transpose(1, 2), name + "rot_k": key.transpose(1, 2), name + "pattern": pattern}
            self.found[name + "attn_scores"] = scores.masked_fill(attention_mask < 0, -math.inf)
            return output, pattern

        return attend

    def as_pairs(self, x: Tensor) -> Tensor:
        """Rotated heads with the two coordinates of a pair beside each other, where they are so before the rotation; some modules
        of transformers put them a half apart while they rotate."""
        if (
            not hasattr(sys.modules[type(self.hf).__module__], "apply_rotary_pos_emb_interleave")
            or not self.cfg.rotary_interleaved
        ):
            return x
        content, rotated = x.split([self.cfg.d_head - self.cfg.rotary_width, self.cfg.rotary_width], dim=-1)
        return torch.cat((content, rotated.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)), dim=-1)

    def gated_mlp(self, name: str, module: torch.nn.Module) -> None:
        self.at(module.gate_proj, lambda x, out: {name + "hook_pre": self.rows(out)})
        self.at(module.up_proj, lambda x, out: {name + "hook_pre_linear": self.rows(out)})
        self.at(module.down_proj, lambda x, out: {name + "hook_post": self.rows(x)})

    def moe(self, name: str, module: torch.nn.Module) -> None:
        def router(x: Tensor, out: tuple[Tensor, ...]) -> dict[str, Tensor]:
            found = {name + "hook_router_logits": self.rows(out[0])}
            if self.cfg.router_score == "sigmoid":
                found[name + "hook_router_scores"] = self.rows(out[0]).sigmoid()
                found[name + "hook_selection_bias"] = module.gate.e_score_correction_bias.expand(*self.shape, -1)
            return found

        self.at(_router(module), router)
        self.experts(name, module.experts)
        if self.cfg.d_shared is None:
            return
        if self.cfg.shared_gate:
            self.gated_mlp(name + "shared.", module.shared_expert)
            self.at(module.shared_expert_gate, lambda x, out: {name + "hook_shared_gate": self.rows(out).sigmoid()})
            self.at(module, lambda x, out: {name + "hook_shared_out": out - self.found[name + "hook_routed_out"]})
        else:
            self.gated_mlp(name + "shared.", module.shared_experts)
            self.at(module.shared_experts, lambda x, out: {name + "hook_shared_out": self.rows(out)})

    def experts(self, name: str, module: torch.nn.Module) -> None:
        cfg = self.cfg

        def hook(module: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
            """transformers' arithmetic for one expert, at every slot that goes to it."""
            x, indices, weights = args
            pre, post = torch.empty(2, *indices.shape, cfg.d_expert), torch.empty(*indices.shape, cfg.d_expert)
            out = torch.empty(*indices.shape, cfg.d_model)
            for expert in range(cfg.num_experts):
                token, slot = torch.where(indices == expert)
                if cfg.expert_bias:
                    both = x[token] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                    pre[0, token, slot], pre[1, token, slot] = both[:, ::2], both[:, 1::2]
                    post[token, slot] = module._apply_gate(both)
                    out[token, slot] = post[token, slot] @ module.down_proj[expert] + module.down_proj_bias[expert]
                else:
                    pre[0, token, slot], pre[1, token, slot] = F.linear(x[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
                    post[token, slot] = module.act_fn(pre[0, token, slot]) * pre[1, token, slot]
                    out[token, slot] = F.linear(post[token, slot], module.down_proj[expert])
                self.found[f"{name}experts.{expert}.hook_out"] = out[token, slot]
            parts = {"pre": pre[0], "pre_linear": pre[1], "post": post, "out": out, "weights": weights, "indices": indices}
            self.found |= {f"{name}hook_expert_{part}": value.unflatten(0, self.shape) for part, value in parts.items()}
            self.found[name + "hook_routed_out"] = self.rows(output)

        self.handles.append(module.register_forward_hook(hook))


def _heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))
