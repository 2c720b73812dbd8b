"""Checks of what users and files give: whole numbers, ranges, names that have to exist; and how a value is shown in a message."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 200
"""How many characters of a value a message shows at most."""
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = SHOWN - 40
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 12


def quoted(value: object) -> str:
    """A value from a file or a command line as a message shows it: as Python writes it, short, and without control characters.

    What others wrote may be a megabyte long, nested without end, or hold signs that a terminal obeys.

    >>> quoted("a\\x1b[2J"), quoted(3), len(quoted("a" * 10**6))
    ("'a\\\\x1b[2J'", '3', 160)
    """
    try:
        return _cut(_BRIEF.repr(value))
    except ValueError:  # Python does not write out whole numbers of more than some thousand digits
        return f"a {type(value).__name__} of too many digits to show"


def printable(text: object, most: int = SHOWN) -> str:
    """A name from a file, or what a library says of one, as `quoted` shows it but for the quotes; newlines stay.

    >>> printable("model.norm.weight"), printable("a\\x1b[2J")
    ('model.norm.weight', 'a\\\\x1b[2J')
    """
    kept = str(text)[: most + 1]
    return _cut("".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in kept), most)


def _cut(text: str, most: int = SHOWN) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


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


def require_defaults(options: Any, *names: str) -> None:
    """Raise `ValueError` where a field of a dataclass has another value than its default, the only one implemented so far."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in names and value != field.default:
            raise ValueError(f"{field.name}={value!r} is not implemented yet: only {field.name}={field.default!r} is")


def require_between(options: Any, low: int | float, high: int | float, *names: str) -> None:
    """Raise `ValueError` where a field of a dataclass is neither None nor a number from `low` to `high`: nan is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {quoted(value)}")
