"""Checks of what users give: whole numbers, from Python, numpy or torch, names that have to exist, and paths."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
from collections.abc import Iterable
from pathlib import Path
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


def expanded_path(path: str | os.PathLike[str]) -> Path:
    """The path, with a home directory in place of ~. Raises `ValueError` where there is none: in containers that run as a user
    without an entry in /etc/passwd and without HOME, and for the ~name of a user who does not exist.

    >>> expanded_path("results/tiny-olmoe").parts
    ('results', 'tiny-olmoe')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{os.fspath(path)!r} begins with a home directory that is not known: set HOME, or give the path itself"
        ) from error


class UnknownNameError(ValueError, KeyError):
    """A name that does not exist, with the nearest ones that do."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known names."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return UnknownNameError(f"unknown {kind} {name!r}{suggestion}{' ' + advice if advice else ''}")


def require_defaults(options: Any, *names: str) -> None:
    """Raise `ValueError` where a field of a dataclass has another value than its default, the only one implemented so far."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in names and value != field.default:
            raise ValueError(f"{field.name}={value!r} is not implemented yet: only {field.name}={field.default!r} is")
