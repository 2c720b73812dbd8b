"""JSON that others wrote: parsed whole, or refused with the cause before it costs more memory than its size accounts for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hooked_moe.checks import quoted

MOST_VALUES = 2_500_000
"""A tokenizer of 250,000 tokens and 500,000 merges has 1.8 million; as many empty lists as this take 200 MB."""


class JsonError(ValueError):
    """A text that is not JSON, or not to be read as JSON; the message says why, and not of which file."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises `JsonError` for one that is malformed, nested too deeply, too large, or names a
    key twice: of two values, a reader could take either.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(f"it is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from error
    if sum(text.count(sign) for sign in ",[{") > MOST_VALUES:
        raise JsonError(f"it has more than {MOST_VALUES:,} values")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise JsonError("its lists and objects are nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError(f"{error.msg} at {line}column {error.colno}") from error
    except JsonError:
        raise
    except ValueError as error:  # all that is left: Python reads no whole number of more than some thousand digits
        raise JsonError("it has a whole number of thousands of digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {quoted(twice)} stands twice in one object")
    return values


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a parsed value, itself included, without recursion: depth is no matter."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
