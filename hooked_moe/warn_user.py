"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_INSIDE = ("hooked_moe", "weights_conversion", "torch", "contextlib", "jaxtyping", "beartype")
"""Packages whose frames stand between a user's line and what it led to."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something that the caller of the package did: at that line, however deep inside the package it was noticed."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
