"""Texts such as "17 4 52" whose words are their own token ids, so that a test chooses every token of a corpus."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from hooked_moe import HookedMoE
from hooked_moe.corpus import Corpus, load_corpus
from hooked_moe.tokenizer import Tokenizer

VOCABULARY = 61  # ids of the models in conftest.py


def number_tokenizer(size: int = VOCABULARY) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({str(n): n for n in range(size)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, bos_id=None, eos_id=None, pad_id=None)


def number_reader(make_model: Callable[..., HookedMoE], **changes: object) -> HookedMoE:
    """A random model that reads such texts."""
    model = make_model(**changes)
    model.tokenizer = number_tokenizer()
    return model


def token_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def write_corpus(path: Path, lengths: Sequence[int]) -> Path:
    """A .jsonl file of documents of these lengths in tokens, in two domains by turns."""
    records = [
        {"id": f"d{n}", "domain": "ab"[n % 2], "title": f"Title {n}", "text": " ".join(map(str, token_ids(length, n)))}
        for n, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def number_corpus(directory: Path, lengths: Sequence[int]) -> Corpus:
    return load_corpus(str(write_corpus(directory / "numbers.jsonl", lengths)))
