from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a model that its family's checkpoint format cannot express."""


def abbreviated(items: Sequence[object], most: int = 10) -> str:
    """The items one a line, indented; past `most` of them, a count of the rest."""
    lines = [f"\n  {item}" for item in items[:most]]
    if len(items) > most:
        lines.append(f"\n  ... and {len(items) - most} more")
    return "".join(lines)
