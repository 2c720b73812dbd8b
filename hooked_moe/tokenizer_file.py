"""A tokenizer.json, checked before the library that runs it may allocate what the file says.

That library (https://github.com/huggingface/tokenizers) believes its file: one that makes texts longer without end, or states a
size that is not there, ends the whole process, and other contradictions come out as panics, which no `except Exception` catches.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from hooked_moe.checks import printable, quoted
from hooked_moe.json_text import JsonError, objects_in, parse_json

MOST_GROWTH = 64
"""How many times longer a tokenizer may make a text, or the text of tokens: room for several replacements of a few characters."""
MOST_ADDED = 256
"""The most tokens that a template may put around a text, and characters in an added token."""


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer. Texts are never cut or padded by it. Raises `ValueError` for a file that is none, or whose
    settings no text would survive."""
    try:
        text = file.read_bytes()
        values = parse_json(text)
        problem = _problem(values)
    except (OSError, JsonError) as error:
        raise ValueError(f"{file} is not a readable tokenizer.json: {error}") from error
    if problem:
        raise ValueError(f"{file} is not a tokenizer.json that can be used: {problem}")
    with named_failures(f"{file} is not a readable tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextmanager
def named_failures(what: str) -> Iterator[None]:
    """Turn what the library raises of its own, bare exceptions and panics, into a `ValueError` that starts with `what`."""
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, ValueError) and type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(f"{what}: {printable(error)}") from error


def _problem(values: Any) -> str:
    """What makes the file one that cannot be used; empty where nothing does. Shapes are left to the library to refuse."""
    if not isinstance(values, dict):
        return "it must hold a JSON object"
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = math.prod(_growth(piece) for piece in objects_in(values.get(part)))
        if growth > MOST_GROWTH:
            return f"its {part} can make a text {growth:,.0f} times longer ({MOST_GROWTH} at most)"
    added = sum(_added_tokens(piece) for piece in objects_in(values.get("post_processor")))
    if added > MOST_ADDED:
        return f"its post_processor puts {added:,} tokens around every text ({MOST_ADDED} at most)"
    for piece in objects_in(values.get("added_tokens")):
        content = piece.get("content")
        if isinstance(content, str) and len(content) > MOST_ADDED:
            return f"an added token has {len(content):,} characters ({MOST_ADDED} at most): {quoted(content)}"
    if not all(_has_its_size(piece) for piece in objects_in(values.get("normalizer"))):
        return "its precompiled_charsmap is not one, or is shorter than it says"
    return ""


def _growth(piece: dict[str, Any]) -> float:
    """How many times longer a text can become by one step: a replacement, a prefix, or a template that repeats the text."""
    content, pattern, prefix, single = (piece.get(key) for key in ("content", "pattern", "prepend", "single"))
    if isinstance(content, str):
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(plain, str) and plain:
            return max(1.0, len(content) / len(plain))
        return 1.0 + len(content)  # no text, like a regular expression, matches between any two characters
    if isinstance(prefix, str):
        return 1.0 + len(prefix)  # before every piece of text between two added tokens
    if isinstance(single, list):
        return max(1.0, float(sum(isinstance(part, dict) and "Sequence" in part for part in single)))
    return 1.0


def _added_tokens(piece: dict[str, Any]) -> int:
    """How many tokens a template puts around a text."""
    single, special = piece.get("single"), piece.get("special_tokens")
    if not isinstance(single, list) or not isinstance(special, dict):
        return 0
    lengths = {
        key: len(token["ids"]) for key, token in special.items() if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    named = (
        part["SpecialToken"].get("id") for part in single if isinstance(part, dict) and isinstance(part.get("SpecialToken"), dict)
    )
    return sum(lengths.get(key, 0) for key in named if isinstance(key, str))


def _has_its_size(piece: dict[str, Any]) -> bool:
    """Whether the map of a SentencePiece normalizer holds as many bytes as its first four say."""
    encoded = piece.get("precompiled_charsmap")
    if not isinstance(encoded, str):
        return True
    try:
        size = int.from_bytes(base64.b64decode(encoded[:6] + "==", validate=True), "little")
    except ValueError:
        return False
    return size <= len(encoded) // 4 * 3
