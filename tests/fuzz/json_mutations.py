"""Structural mutations of JSON: a value in the tree becomes hostile, changes its type, goes, doubles, or moves."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_NESTED = "@@NESTED{}@@"
_DIGITS = "@@DIGITS{}@@"
_TWICE = "@@TWICE@@"

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 64, -1, -(2**31), 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64),
    *(10**6, 3 * 10**9, 10**8, 10**18, 10**400, _DIGITS.format(5000)),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e15, 1e39, 1e308, float("nan"), float("inf"), float("-inf")),
)
STRINGS = (
    *(
        "",
        " ",
        "a",
        "0",
        "3",
        "true",
        "null",
        "NaN",
        "a" * 300,
        "x" * 100_000,
        "\x00",
        "\x1b[2J\x1b[31m",
        "\u202eabc",
        "\ud800",
        "\x7f\x9b",
    ),
    *("../../outside.safetensors", "/dev/zero", "model.safetensors", "config.json", ".", "..", "a" * 300 + ".safetensors"),
    *("\u2581", "\U0001f40b", "<|endoftext|>", "(a+)+$", "("),
)
CONTAINERS: tuple[Any, ...] = (
    *([], {}, [[]], [{}], {"": {}}, [0] * 5000, ["a"] * 1000, {str(i): i for i in range(2000)}),
    *(_NESTED.format(depth) for depth in (40, 150, 900, 1500, 100_000)),
)


def hostile(rng: random.Random) -> Any:
    """A value that no file should have in most places."""
    return copy.deepcopy(
        rng.choice((True, False, None, rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(STRINGS), rng.choice(CONTAINERS)))
    )


def mutate(value: Any, rng: random.Random, dictionary: tuple[Any, ...] = ()) -> tuple[Any, str]:
    """A mutated copy, and what was done to it.

    `dictionary` has values that mean something in this kind of file; one that has a place is a pair of its key and the value.
    """
    root = [copy.deepcopy(value)]
    container, key, path = _random_place(root, rng)
    old = container[key]
    kinds = ["hostile", "hostile", "delete", "near", "near", "elsewhere", "twice", "repeat"] + ["dictionary"] * 3 * bool(
        dictionary
    )
    kind = rng.choice(kinds)
    if kind == "delete":
        del container[key]
    elif kind == "twice" and isinstance(container, dict):
        container[f"{_TWICE}{key}"] = hostile(rng) if rng.random() < 0.5 else copy.deepcopy(old)
    elif kind == "repeat" and isinstance(old, list | str):
        container[key] = old * rng.choice((2, 10, 1000) if len(old) < 100 else (2,))
    elif kind == "near":
        container[key] = _near(old, rng)
    elif kind == "elsewhere":
        other, other_key, _ = _random_place(root, rng)
        container[key] = copy.deepcopy(other[other_key])
    elif kind == "dictionary":
        word = copy.deepcopy(rng.choice(dictionary))
        if isinstance(word, tuple) and isinstance(root[0], dict) and rng.random() < 0.8:
            container, (key, word), path = root[0], word, f"/{word[0]}"
        container[key] = word[1] if isinstance(word, tuple) else word
    else:
        container[key] = hostile(rng)
    return (root[0] if root else None), f"{kind} at {path}"


def dumps(value: Any) -> bytes:
    """The JSON text, with what `json` itself would not write: doubled keys, deep nesting, thousands of digits."""
    text = json.dumps(value, ensure_ascii=True).replace(f'"{_TWICE}', '"')
    for depth in (40, 150, 900, 1500, 100_000):
        text = text.replace(f'"{_NESTED.format(depth)}"', "[" * depth + "]" * depth)
    return text.replace(f'"{_DIGITS.format(5000)}"', "9" * 5000).encode()


def _random_place(root: list[Any], rng: random.Random) -> tuple[Any, Any, str]:
    """A container and a key in it, found by a walk down from the root: what is near the root is hit more often."""
    container, key, path = root, 0, ""
    while isinstance(container[key], dict | list) and container[key] and (not path or rng.random() < 0.8):
        container = container[key]
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
        path += f"/{key}"[:60]
    return container, key, path[:200] or "/"


def _half(value: float) -> float:
    """Half of it, in whole numbers where the first change has left more than a float holds."""
    return value // 2 if isinstance(value, int) and value.bit_length() > 1000 else value / 2


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same meaning or nearly so: a number off by one, as text, in a list; a list without its end."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value)))
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, _half(value), str(value), [value], bool(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "a", value.upper(), value * 2, [value], value + "\x1b[2J", None))
    if isinstance(value, list):
        return rng.choice((value[:-1], value[1:], value[::-1], value + value, {str(i): v for i, v in enumerate(value)}))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), [value], dict(list(value.items())[:-1]), {"a": value}))
    return hostile(rng)
