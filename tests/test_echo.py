"""How values of strangers are shown, and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from hooked_moe.checks import SHOWN, printable, quoted, require_between


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 100_000,
        "\x1b[2J" * 1000,
        "\x1b]0;title\x07\x9b31m\x7f\u202e\ud800\x00",
        10**400,
        10**5000,
        -(10**5000),
        nested(500),
        {str(i): [i] * 100 for i in range(1000)},
        ["\x1b"] * 1000,
        {"\x1b[31m": "\x1b[0m"},
        float("nan"),
        b"\x1b" * 1000,
        None,
    ],
    ids=range(13),
)
def test_whatever_a_file_holds_is_shown_short_and_without_signs_that_a_terminal_obeys(value: Any) -> None:
    for shown in (
        quoted(value),
        printable("\n".join([quoted(value)] * 3)),
        *([printable(value)] if isinstance(value, str) else []),
    ):
        assert 0 < len(shown) <= SHOWN
        assert shown.replace("\n", "").isprintable()
        shown.encode("utf-8")


@pytest.mark.parametrize("value", ["gelu", "it's", "naïve 鯨", 3, -1.5, True, None, [1, 2], {"a": [1]}, ""])
def test_ordinary_values_are_shown_as_python_writes_them(value: Any) -> None:
    assert quoted(value) == repr(value)
    if isinstance(value, str):
        assert printable(value) == value


@dataclass
class Options:
    share: Any


@pytest.mark.parametrize("share", [0, 1, 0.5, None])
def test_numbers_in_range_pass(share: Any) -> None:
    require_between(Options(share), 0, 1, "share")


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan, math.inf, -math.inf, 10**400])
def test_numbers_out_of_range_and_nan_are_refused(share: Any) -> None:
    with pytest.raises(ValueError, match="share must be a number from 0 to 1, not "):
        require_between(Options(share), 0, 1, "share")
