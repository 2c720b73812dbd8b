"""Checks of what users give: whole numbers, from Python, numpy or torch, and names that have to exist."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import Any


def as_int_or_none(value: Any) -> int | None:
    """The value as an int, if it is a whole number; None if it is anything else: True and False, or a row of one number."""
    dtype, n_axes = getattr(value, "dtype", None), getattr(value, "ndim", 0)
    if isinstance(value, bool) or str(dtype) == "torch.bool" or n_axes:  # by its name: nothing here waits for torch
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


class UnknownNameError(ValueError, KeyError):
    """A name that does not exist, with the nearest ones that do."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known names."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return UnknownNameError(f"unknown {kind} {name!r}{suggestion}{' ' + advice if advice else ''}")
