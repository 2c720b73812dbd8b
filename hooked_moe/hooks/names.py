"""Names of hook points, in full ("blocks.3.mlp.hook_router_logits") and in short ("router_logits", in one layer or in all)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from hooked_moe.checks import UnknownNameError, unknown_name, whole_number

Name = str | tuple[Any, ...]
"""A full name; a short one, in every layer; or (short name, layer or None, part of the block): the part where it is ambiguous."""

ALIASES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v"}
"""Other short names that TransformerLens has."""


def is_one_name(name: Any) -> bool:
    """Whether this is one name and not several: "z", or ("z", 3), but not ("z", "v")."""
    return isinstance(name, str) or (isinstance(name, tuple) and len(name) > 1 and not isinstance(name[1], str | tuple))


class Names:
    """The full names of a model's hook points or a cache's activations, by short ones; single experts have none."""

    def __init__(self, full: Collection[str], n_layers: int | None, kind: str = "hook point", advice: str = "") -> None:
        self.full, self.n_layers, self.kind, self.advice = dict.fromkeys(full), n_layers, kind, advice
        self.by_short: dict[str, list[str]] = {}
        for name in full:
            if ".experts." not in name:
                self.by_short.setdefault(name.rpartition(".")[2].removeprefix("hook_"), []).append(name)

    def meant(self, name: Name) -> list[str]:
        """The full names that a name stands for: at most one in each block.

        Raises `UnknownNameError` where there is none, with the nearest ones, and where a block has several.
        """
        if isinstance(name, str) and name in self.full:
            return [name]
        if not isinstance(name, str | tuple):
            raise unknown_name(self.kind, name, self.full, self.advice)
        short, layer, part = (*((name,) if isinstance(name, str) else name), None, None)[:3]
        layer = None if layer is None else whole_number(layer, "the layer")
        short = str(short).removeprefix("hook_")
        short = ALIASES.get(short, short)
        if layer is not None and layer < 0:
            if self.n_layers is None:
                raise UnknownNameError(f"{name}: this cache does not know how many layers there are; count them from 0")
            layer += self.n_layers
        block = "" if layer is None else f"blocks.{layer}."
        matches = [full for full in self.by_short.get(short, ()) if full.startswith(block)]
        matches = [full for full in matches if part is None or f".{part}." in f".{full}"]
        if not matches:
            full = name if isinstance(name, str) else f"{block}{'' if part is None else f'{part}.'}hook_{short}"
            raise unknown_name(self.kind, full, self.full if "." in full else {*self.full, *self.by_short}, self.advice)
        crowded = [block for block, count in Counter(map(_block, matches)).items() if count > 1]
        if crowded:
            several = [full for full in matches if _block(full) == crowded[0]]
            example = (short, layer, several[0].split(".")[2])
            raise UnknownNameError(f"{name!r} could be any of {several}; name the part too, as in {example}")
        return matches


def _block(full: str) -> str:
    return ".".join(full.split(".")[:2])
