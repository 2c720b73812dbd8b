"""Checks of what users and files give: whole numbers, ranges, names that exist, paths; and how a value is shown in a message.

Floats are never whole numbers, 3.0 as little as 2.5: half precision rounds numbers from 257 on, and what came out of arithmetic
may be rounded already. Bools are none either; a bool array is a mask, where one is expected.
"""

from __future__ import annotations

import difflib
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

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
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to write down the largest
    return _cut(_BRIEF.repr(value))


def printable(text: object, most: int = SHOWN) -> str:
    """A name from a file, or what a library says of one, as `quoted` shows it but for the quotes; newlines stay.

    >>> printable("model.norm.weight"), printable("a\\x1b[2J")
    ('model.norm.weight', 'a\\\\x1b[2J')
    """
    kept = str(text)[: most + 1]
    return _cut("".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in kept), most)


def as_unicode(name: str) -> str:
    """The name of a file as Unicode text: bytes in another encoding, which Python keeps as halves of surrogate pairs and cannot
    write, are spelled out.

    >>> as_unicode("na\u00efve.txt"), as_unicode("na\udcefve.txt")
    ('na\u00efve.txt', 'na\\\\udcefve.txt')
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


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


class WrongTypeError(TypeError, ValueError):
    """A value of another type than the one expected."""


def whole_number(value: Any, what: str) -> int:
    """The value as an int. Raises `WrongTypeError`, which calls it `what`, for anything but a whole number."""
    number = as_int_or_none(value)
    if number is None:
        raise WrongTypeError(f"{what} must be a whole number, not {described(value)}")
    return number


def whole_numbers(values: Any, what: str, count: int | None = None) -> list[int]:
    """Whole numbers as ints, from a list, set, range, generator, array or tensor of one axis, each read once.

    With `count`, a bool array or tensor of that many entries is a mask: it stands for the numbers at which it is True. Raises
    `WrongTypeError` for anything else, and `ValueError` for a mask of another length.

        whole_numbers(torch.tensor([3, 17]), "experts")                        # [3, 17]
        whole_numbers(np.array([True, False, True]), "experts", count=3)       # [0, 2]
    """
    if as_int_or_none(values) is not None:
        raise WrongTypeError(f"{what} must be a list of whole numbers, as in [{values}], not the number {values}")
    dtype, n_axes = getattr(values, "dtype", None), getattr(values, "ndim", 1)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or n_axes != 1:
        raise WrongTypeError(f"{what} must be a list of whole numbers, or an array of one axis, not {described(values)}")
    items = list(values) if dtype is None or not hasattr(values, "tolist") else values.tolist()
    if count is not None and str(dtype) in ("bool", "torch.bool"):
        if len(items) != count:
            raise ValueError(f"{what} given as a bool mask must have {count} entries, one for each there is, not {len(items)}")
        return [number for number, chosen in enumerate(items) if chosen]
    numbers = [as_int_or_none(item) for item in items]
    if None in numbers:
        raise WrongTypeError(f"{what} must be whole numbers, not {described(items[numbers.index(None)])}")
    return [number for number in numbers if number is not None]


def pairs_of_numbers(pairs: Any, what: str, form: str) -> list[tuple[int, int]]:
    """Pairs of whole numbers, such as (document, position), from any iterable or array of them. Raises `WrongTypeError`."""
    numbers = []
    for pair in in_list(pairs, what, f"[{form}]"):
        both = whole_numbers(pair, what) if isinstance(pair, Iterable) else []
        if len(both) != 2:
            raise WrongTypeError(f"{what} must be pairs {form}, not {described(pair)}")
        numbers.append((both[0], both[1]))
    return numbers


def by_number(mapping: Mapping[Any, Value], what: str) -> dict[int, Value]:
    """A mapping whose keys are ints. Raises `WrongTypeError` for other keys or no mapping, and `ValueError` for two that are one.

    A tensor is never equal to an int as a key, whatever number it holds.
    """
    if not isinstance(mapping, Mapping):
        raise WrongTypeError(f"expected a mapping, {{{what}: ...}}, not {described(mapping)}")
    numbered: dict[int, Value] = {}
    for key, value in mapping.items():
        number = whole_number(key, f"a {what}")
        if number in numbered:
            raise ValueError(f"{what} {number} is there twice, as {type(key).__name__} too: give each once")
        numbered[number] = value
    return numbered


def described(value: Any) -> str:
    """A value as errors show it: in few words, whatever its size."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    if dtype is not None and len(shape):
        return f"{type(value).__name__} of {dtype} {list(shape)}"
    return quoted(value)


def in_list(values: Any, what: str, example: str) -> list[Any]:
    """What an iterable holds, taken once.

    Raises `WrongTypeError` for text, a mapping and what is no iterable, and `ValueError` for an iterator that yields nothing: it
    may have been used up before.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise WrongTypeError(f"{what} must be a list, as in {example}, not {described(values)}")
    items = list(values)
    if not items and isinstance(values, Iterator):
        raise ValueError(f"{what} is an iterator that yields nothing, or was used up before: give a list, as in {example}")
    return items


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
            f"{quoted(os.fspath(path))} begins with a home directory that is not known: set HOME, or give the path itself"
        ) from error


def is_hook(pair: Any) -> bool:
    """Whether this is (name, names or predicate, function)."""
    return isinstance(pair, list | tuple) and len(pair) == 2 and callable(pair[1])


def as_hooks(hooks: Any, what: str) -> list[Any]:
    """Hooks in a list, taken once from any iterable. Raises `WrongTypeError` for one alone, a mapping, or anything else."""
    expected = "(name, function) pairs, as in [(name, function)]"
    if isinstance(hooks, Iterable) and not isinstance(hooks, str | Mapping):
        pairs = list(hooks)
        wrong = [pair for pair in pairs if not is_hook(pair)]
        if not wrong:
            return pairs
        raise WrongTypeError(f"{what} must be a list of {expected}; {described(wrong[0])} is no pair of them")
    raise WrongTypeError(f"{what} must be a list of {expected}, not {described(hooks)}")


def check_text(text: Any) -> str:
    """The text. Raises `ValueError` for half of a surrogate pair, which is no Unicode, and `WrongTypeError` for no text."""
    if not isinstance(text, str):
        raise WrongTypeError(f"expected a text, not {described(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"this is no Unicode text: half of a surrogate pair, {text[error.start]!a}, is at character {error.start}, in "
            f"{text[max(0, error.start - 10) : error.end + 10]!a}; text.encode('utf-16', 'surrogatepass').decode('utf-16', "
            "'replace') puts a replacement character there"
        ) from error
    return text


class UnknownNameError(ValueError, KeyError):
    """A name that does not exist, with the nearest ones that do."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known names."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return UnknownNameError(f"unknown {kind} {described(name)}{suggestion}{' ' + advice if advice else ''}")


def require_between(options: Any, low: int | float, high: int | float, *names: str) -> None:
    """Raise `ValueError` where a field of a dataclass is neither None nor a number from `low` to `high`: nan is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {quoted(value)}")
