"""Fuzzing of checkpoint directories: config, header, tensors, index, tokenizer."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from hooked_moe import HookedMoE, HookedMoEConfig, Tokenizer
from hooked_moe.generation import end_tokens
from hooked_moe.loading import saving
from tests.fuzz.byte_mutations import mutate_bytes, mutate_file
from tests.fuzz.json_mutations import dumps, mutate
from tests.fuzz.tensor_files import mutate_tensors
from tests.fuzz.tokenizer_words import TOKENIZER_WORDS

TEXT = "The sea and the land aaaaaaaaaaaaaaaa; 19 whales \u2014 na\u00efve \U0001f40b <|endoftext|> all."
EXTREME = 1e12
"""Weights from here on overflow in a forward pass, which is what they say."""
_CONFIG_WORDS: tuple[Any, ...] = (
    *("olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe", "mixtral", "llama", "group_limited_greedy", "yarn", "gelu"),
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "rope_theta": 10.0, "factor": 1e308, "original_max_position_embeddings": 2**62, "beta_fast": 1e300},
    {"rope_type": [], "type": {}},
    ["sliding_attention"],
    {"quant_method": "fp8"},
)
_SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "d_vocab": 300,
    "n_ctx": 32,
    "n_heads": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "d_expert": 6,
    "eos_token_id": 0,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"n_key_value_heads": 2, "d_head": 8, "qk_norm": "full", "clip_qkv": 3.0},
    "qwen2_moe": {
        "n_key_value_heads": 1,
        "d_head": 8,
        "qkv_bias": True,
        "d_shared": 10,
        "shared_gate": True,
        "dense_layers": (0,),
        "d_mlp": 12,
    },
    "deepseek_v2": {
        "n_key_value_heads": 2,
        "d_head": 10,
        "d_rotary": 4,
        "d_value": 6,
        "kv_lora_rank": 8,
        "rotary_interleaved": True,
        "d_shared": 12,
    },
}


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    return Tokenizer(backend, None, 0, None)


def small_checkpoints() -> list[dict[str, bytes]]:
    """The files of one valid checkpoint of each family; one of them is in shards."""
    seeds = []
    for family, options in _FAMILIES.items():
        torch.manual_seed(0)
        model = HookedMoE(HookedMoEConfig(**_SIZES | options, model_type=family), small_tokenizer())
        with tempfile.TemporaryDirectory() as directory:
            most = 12_000 if family == "qwen2_moe" else 10**9
            with mock.patch.object(saving, "MAX_SHARD_BYTES", most):
                model.save_pretrained(directory)
            files = {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir())}
            seeds.append(files | {"generation_config.json": b'{"eos_token_id": [0, 5], "do_sample": true}'})
    return seeds


class Checkpoints:
    name = "checkpoints"
    shown_by_console = False
    seconds = 10

    def prepare(self) -> None:
        self.seeds = small_checkpoints()

    def write(self, rng: random.Random, directory: Path) -> str:
        files = dict(rng.choice(self.seeds))
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            name = rng.choice(_weighted(files))
            files[name], what = _mutated(name, files[name], rng)
            done.append(f"{name}: {what}")
        for name, data in files.items():
            (directory / name).write_bytes(data)
        if rng.random() < 0.03:
            done.append(mutate_file(directory / rng.choice(sorted(files)), rng))
        return "; ".join(done)

    def run(self, directory: Path) -> str:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            model = HookedMoE.from_pretrained(directory, stream=directory.name[-1] in "05")
            with torch.no_grad():
                logits = [model(torch.tensor([[1, 5, 299 % model.cfg.d_vocab, 0]]))]
                if model.tokenizer is not None:
                    ids = model.tokenizer.encode(TEXT)
                    model.tokenizer.decode(ids)
                    model.tokenizer.decode([0, 7, 299])
                    if ids and len(ids) <= model.cfg.n_ctx * 8:
                        logits.append(model(TEXT))
                if end_tokens(model):
                    model.generate(torch.tensor([[1, 5]]), 1, do_sample=False, verbose=False)
        if not all(bool(x.isfinite().all()) for x in logits) and not any(
            "NaN or infinite" in str(note.message) for note in noted
        ):
            return "" if _extreme(directory) else "logits that are not finite, of finite weights, without a word"
        return ""


def _weighted(files: dict[str, bytes]) -> list[str]:
    often = {"config.json": 5, "tokenizer.json": 6, "model.safetensors.index.json": 3}
    return [name for name in files for _ in range(often.get(name, 2 if name == "model.safetensors" else 1))]


def _mutated(name: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        if name.endswith(".safetensors"):
            return mutate_tensors(data, rng)
        words = {"tokenizer.json": TOKENIZER_WORDS, "config.json": _CONFIG_WORDS}.get(name, ())
        value, what = mutate(json.loads(data), rng, words)
        return dumps(value), what
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):  # an earlier mutation left no structure to mutate
        return mutate_bytes(data, rng)


def _extreme(directory: Path) -> bool:
    """Whether some stored weight is too large to compute with."""
    tensors = [tensor for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]
    return any(bool((tensor.double().abs() > EXTREME).any()) for tensor in tensors)
