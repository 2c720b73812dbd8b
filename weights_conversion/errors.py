from __future__ import annotations

from collections.abc import Sequence

from hooked_moe.checks import printable


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a model that its family's checkpoint format cannot express."""


def abbreviated(items: Sequence[object], most: int = 10) -> str:
    """The items one a line, indented and shown without harm; past `most` of them, a count of the rest."""
    lines = [f"\n  {printable(item)}" for item in items[:most]]
    if len(items) > most:
        lines.append(f"\n  ... and {len(items) - most} more")
    return "".join(lines)
