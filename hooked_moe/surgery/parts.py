"""The parts of a model that can be taken from another training of it: every parameter belongs to exactly one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from hooked_moe.checks import as_int_or_none, unknown_name
from hooked_moe.transformer import Transformer

BLOCK_PARTS: Mapping[str, str] = {
    "attention": r"attn\..+|ln1\.w",
    "router": r"mlp\.router\..+",
    "experts": r"mlp\.experts\..+",
    "shared": r"mlp\.shared\..+|mlp\.W_shared_gate",
    "mlp": r"mlp\.W_(gate|in|out)",
    "ln2": r"ln2\.w",
}
"""Parts of a block: the names of their parameters after "blocks.<layer>.". "mlp" is the MLP of a dense layer."""
OUTER_PARTS: Mapping[str, str] = {"embedding": r"embed\.W_E", "final_norm": r"ln_final\.w", "unembedding": r"unembed\.W_U"}
"""Parts outside the blocks."""
PARTS = (*BLOCK_PARTS, *OUTER_PARTS)

Place = tuple[int | None, str]
"""(layer, part); the layer is None outside the blocks."""
Layers = Iterable[int] | Literal["all"]
Parts = Iterable[str] | Literal["all"]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def place_of(parameter: str) -> Place:
    """The layer and part of a parameter, by its name.

    >>> place_of("blocks.3.mlp.router.W")
    (3, 'router')
    """
    match = _BLOCK.fullmatch(parameter)
    layer, name, table = (int(match[1]), match[2], BLOCK_PARTS) if match else (None, parameter, OUTER_PARTS)
    parts = [part for part, pattern in table.items() if re.fullmatch(pattern, name)]
    assert len(parts) == 1, f"{parameter} belongs to {parts}"
    return layer, parts[0]


def places(model: Transformer) -> dict[Place, list[str]]:
    """Every part of a model and the names of its parameters; tied weights belong to the embedding."""
    if model.streams:
        raise ValueError("this model is streamed: graft its checkpoints (hooked_moe.surgery.graft_checkpoints)")
    by_place: dict[Place, list[str]] = {}
    for name, _ in model.named_parameters():
        by_place.setdefault(place_of(name), []).append(name)
    return by_place


def chosen_places(available: Iterable[Place], layers: Layers, parts: Parts) -> frozenset[Place]:
    """The places in some layers and of some parts; outer parts are taken whatever the layers.

    Raises `UnknownNameError` for a part that does not exist, and `ValueError` for layers out of range and for parts that this
    model does not have (shared experts, or the unembedding where it is the embedding).
    """
    known = list(available)
    n_layers = 1 + max(layer for layer, _ in known if layer is not None)
    wanted_layers = set(range(n_layers)) if layers == "all" else {_checked_layer(layer, n_layers) for layer in layers}
    if parts == "all":
        return frozenset(place for place in known if place[0] is None or place[0] in wanted_layers)
    names = [parts] if isinstance(parts, str) else list(parts)
    for name in names:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS, f"There are {', '.join(PARTS)}.")
        if name not in {part for _, part in known}:
            reason = "its weights are those of the embedding" if name == "unembedding" else "it has none"
            raise ValueError(f"this model has no part {name!r} to graft: {reason}")
    return frozenset((layer, part) for layer, part in known if part in names and (layer is None or layer in wanted_layers))


def _checked_layer(layer: int, n_layers: int) -> int:
    number = as_int_or_none(layer)
    if number is None or not 0 <= number < n_layers:
        raise ValueError(f"layers={layer!r}: the model has layers 0 to {n_layers - 1}")
    return number
