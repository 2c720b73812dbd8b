"""Mutations of safetensors files: their header, the values, and what the header says of them."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from tests.fuzz.json_mutations import dumps, mutate

_PATTERNS = {"F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"), "BF16": (b"\xc0\x7f", b"\x80\x7f")}
_HEADER_WORDS: tuple[Any, ...] = (
    *("F32", "F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4"),
    *([0], [2**62, 4], [2**32, 2**32, 0], [-1], [1], [16, 16], [0, 10**9], [4, 0], [0, 2**63]),
    *({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
)


def mutate_tensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The bytes of a safetensors file, mutated where its structure says something."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.choice(("header", "header", "header", "length", "values", "rename", "drop", "many"))
    if kind == "length":
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        return struct.pack("<Q", length) + data[8:], f"header length {length}"
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == "values":
        start, end = header[name]["data_offsets"]
        pattern = rng.choice(_PATTERNS.get(header[name]["dtype"], (b"\xff\xff",)))
        place = start + len(pattern) * rng.randrange((end - start) // len(pattern))
        body = body[:place] + pattern + body[place + len(pattern) :]
        what = f"{pattern.hex()} in {name}"
    elif kind == "rename":
        other = rng.choice((name + "x", name.replace(".0.", ".7."), "lm_head.weight", "x\x1b[2J", "a" * 5000, ""))
        header[other] = header.pop(name)
        what = f"{name} renamed"
    elif kind == "drop":
        start, end = header.pop(name)["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
        body = body[:start] + body[end:]
        what = f"{name} dropped"
    elif kind == "many":
        header |= {
            f"model.layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(rng.choice((3, 3000)))
        }
        what = "tensors without values"
    else:
        header, what = mutate(header, rng, _HEADER_WORDS)
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + body, f"{kind}: {what}"
