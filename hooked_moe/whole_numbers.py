"""Whole numbers, from Python, numpy or torch."""

from __future__ import annotations

import operator
from typing import Any

import torch


def as_whole(value: Any) -> int | None:
    """The value as an int, if it is a whole number; None if it is anything else: True and False, or a row of one number."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None
