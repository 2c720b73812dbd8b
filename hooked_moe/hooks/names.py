"""Names of hook points, in full ("blocks.3.mlp.hook_router_logits") and in short ("router_logits", in one layer or in all)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from hooked_moe.checks import UnknownNameError, unknown_name

Name = str | tuple[Any, ...]
"""A full name; a short one, in every layer; or (short name, layer or None, part of the block): the part where it is ambiguous."""

ALIASES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v"}
"""Other short names that TransformerLens has."""


def is_one_name(name: Any) -> bool:
    """Whether this is one name and not several: "z", or ("z", 3), but not ("z", "v")."""
    return isinstance(name, str) or (isinstance(name, tuple) and len(name) > 1 and not isinstance(name[1], str | tuple))


def names_meant(name: Name, known: Collection[str], n_layers: int | None, kind: str = "hook point") -> list[str]:
    """The full names among `known` that a name stands for: at most one in each block, and none of a single expert's.

    Raises `UnknownNameError` where there is none, with the nearest ones, and where a block has several.
    """
    if isinstance(name, str) and name in known:
        return [name]
    short, layer, part = (*((name,) if isinstance(name, str) else name), None, None)[:3]
    short = str(short).removeprefix("hook_")
    short = ALIASES.get(short, short)
    if layer is not None and layer < 0:
        if n_layers is None:
            raise UnknownNameError(f"{name}: this cache does not know how many layers there are; count them from 0")
        layer += n_layers
    block = "" if layer is None else f"blocks.{layer}."
    matches = [full for full in known if _is_called(full, short) and full.startswith(block)]
    matches = [full for full in matches if part is None or f".{part}." in f".{full}"]
    if not matches:
        full = str(name) if isinstance(name, str) else f"{block}{'' if part is None else f'{part}.'}hook_{short}"
        nearest = known if "." in full else {*known, *(full.rpartition("hook_")[2] for full in known)}
        raise unknown_name(kind, full, nearest, "See model.hook_dict for all names." if kind == "hook point" else "")
    crowded = [block for block, count in Counter(".".join(full.split(".")[:2]) for full in matches).items() if count > 1]
    if crowded:
        several = [full for full in matches if full.startswith(f"{crowded[0]}.")]
        example = (short, layer, several[0].split(".")[2])
        raise UnknownNameError(f"{name!r} could be any of {several}; name the part too, as in {example}")
    return matches


def _is_called(full: str, short: str) -> bool:
    return full.rpartition(".")[2] == f"hook_{short}" and ".experts." not in full
