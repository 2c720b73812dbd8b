"""Whole numbers and names, whatever holds them: read once, as what they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hooked_moe.checks import (
    SHOWN,
    WrongTypeError,
    as_int_or_none,
    by_number,
    check_text,
    described,
    in_list,
    whole_number,
    whole_numbers,
)

NUMBERS = {
    "int": 3,
    "numpy scalar": np.int64(3),
    "small numpy scalar": np.uint8(3),
    "large unsigned": np.uint64(3),
    "0-d array": np.array(3),
    "0-d tensor": torch.tensor(3),
    "0-d tensor of bytes": torch.tensor(3, dtype=torch.uint8),
    "parameter": torch.nn.Parameter(torch.tensor(3), requires_grad=False),
}
NO_NUMBERS: dict[str, Any] = {
    "float": 3.0,
    "numpy float": np.float64(3),
    "0-d float tensor": torch.tensor(3.0),
    "rounded tensor": torch.tensor(257, dtype=torch.bfloat16),
    "bool": True,
    "numpy bool": np.True_,
    "0-d bool tensor": torch.tensor(True),
    "row of one": torch.tensor([3]),
    "array of one": np.array([3]),
    "list of one": [3],
    "text": "3",
    "nothing": None,
    "complex": 3 + 0j,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_whole_number_is_one_whatever_holds_it(kind: str) -> None:
    number = whole_number(NUMBERS[kind], "the layer")
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_whole_number_is_refused_by_name(kind: str) -> None:
    assert as_int_or_none(NO_NUMBERS[kind]) is None
    with pytest.raises(WrongTypeError, match="the layer must be a whole number, not"):
        whole_number(NO_NUMBERS[kind], "the layer")


SEVERAL: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 2],
    "tuple": lambda: (0, 2),
    "range": lambda: range(0, 3, 2),
    "set": lambda: {0, 2},
    "keys": lambda: {0: "a", 2: "b"}.keys(),
    "values": lambda: {"a": 0, "b": 2}.values(),
    "generator": lambda: (number for number in (0, 2)),
    "map": lambda: map(int, "02"),
    "filter": lambda: filter(lambda number: number != 1, range(3)),
    "array": lambda: np.array([0, 2]),
    "unsigned array": lambda: np.array([0, 2], dtype=np.uint64),
    "tensor": lambda: torch.tensor([0, 2]),
    "tensor of bytes": lambda: torch.tensor([0, 2], dtype=torch.uint8),
    "scattered tensor": lambda: torch.tensor([[0, 1], [2, 3]])[:, 0],
    "0-d tensors": lambda: list(torch.tensor([0, 2])),
    "numpy scalars": lambda: list(np.array([0, 2])),
    "mask": lambda: torch.tensor([True, False, True]),
    "array mask": lambda: np.array([True, False, True]),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_whole_numbers_come_in_any_container_and_are_read_once(kind: str) -> None:
    numbers = whole_numbers(SEVERAL[kind](), "experts", count=3)
    assert sorted(numbers) == [0, 2]
    assert all(type(number) is int for number in numbers)


NOTHING = [[], (), torch.tensor([]), np.array([]), iter(()), {}.keys()]


@pytest.mark.parametrize("empty", NOTHING, ids=lambda empty: type(empty).__name__)
def test_no_numbers_are_no_numbers(empty: Any) -> None:
    assert whole_numbers(empty, "experts", count=3) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (2, r"experts must be a list of whole numbers, as in \[2\], not the number 2"),
        (torch.tensor(2), r"as in \[2\], not the number 2"),
        (torch.tensor([[0, 2]]), r"not Tensor of torch.int64 \[1, 2\]"),
        (np.array([0.0, 2.0]), "experts must be whole numbers, not 0.0"),
        (torch.tensor([0.0, 2.5]), "experts must be whole numbers, not 0.0"),
        ([0, True], "experts must be whole numbers, not True"),
        ([0, None], "experts must be whole numbers, not None"),
        ("02", "not '02'"),
        (b"02", "not b'02'"),
        ({0: 2}, "not {0: 2}"),
        (None, "not None"),
        (2.5, "not 2.5"),
        (slice(0, 2), "not slice"),
        (torch.ones(2, dtype=torch.bool), "must have 3 entries, one for each there is, not 2"),
    ],
    ids=repr,
)
def test_what_are_no_whole_numbers_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole_numbers(values, "experts", count=3)


def test_a_mask_is_none_where_there_is_nothing_to_mask() -> None:
    with pytest.raises(WrongTypeError, match="seeds must be whole numbers, not True"):
        whole_numbers(torch.tensor([True, False]), "seeds")


@pytest.mark.usefixtures("unchecked")
def test_keys_of_a_mapping_are_plain_numbers() -> None:
    """A tensor as a key is equal to no int, so that what it names is never found."""
    given = {torch.tensor(2): "a", np.int32(1): "b", 0: "c"}
    assert 2 not in given
    assert by_number(given, "layer") == {2: "a", 1: "b", 0: "c"}
    with pytest.raises(ValueError, match="layer 0 is there twice, as Tensor too: give each once"):
        by_number({0: "a", torch.tensor(0): "b"}, "layer")
    with pytest.raises(WrongTypeError, match=r"expected a mapping, \{layer: ...\}, not \[0, 1\]"):
        by_number([0, 1], "layer")
    with pytest.raises(WrongTypeError, match="a layer must be a whole number, not 'first'"):
        by_number({"first": 1}, "layer")


def test_iterators_are_taken_once_and_used_up_ones_are_told() -> None:
    names = filter(None, ["a", "", "b"])
    assert in_list(names, "names", "['a']") == ["a", "b"]
    with pytest.raises(ValueError, match="names is an iterator that yields nothing, or was used up before"):
        in_list(names, "names", "['a']")
    assert in_list([], "names", "['a']") == []
    for wrong in ("a", {"a": 1}, 3, None):
        with pytest.raises(WrongTypeError, match=r"names must be a list, as in \['a'\], not"):
            in_list(wrong, "names", "['a']")


def test_what_is_no_text_is_refused_with_the_place() -> None:
    assert check_text("naïve 鯨 \x00") == "naïve 鯨 \x00"
    with pytest.raises(ValueError, match=r"half of a surrogate pair, '\\ud83d', is at character 3, in 'ab \\ud83d cd'"):
        check_text("ab \ud83d cd")
    assert check_text("a\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace")) == "a�"  # the way out it names
    for wrong in (None, 3, b"bytes", ["text"]):
        with pytest.raises(WrongTypeError, match="expected a text, not"):
            check_text(wrong)


HUGE = ["x" * 10_000, list(range(10_000)), torch.zeros(9, 9), np.zeros(9), 10**300, 10**5000, object()]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__)
def test_values_are_shown_in_few_words(value: Any) -> None:
    assert 0 < len(described(value)) <= SHOWN
