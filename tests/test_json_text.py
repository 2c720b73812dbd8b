"""JSON from strangers: read as it stands, or refused with the cause."""

from __future__ import annotations

import json
import math

import pytest

from hooked_moe import json_text
from hooked_moe.json_text import JsonError, objects_in, parse_json


@pytest.mark.parametrize("text", ['{"a": [1, -2.5e3, null, true, "\\u00e9"], "b": {}}', "[]", '"a"', " 3 ", '{"a": {"a": 1}}'])
def test_what_is_json_is_read_as_python_reads_it(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_a_byte_order_mark_and_nan_are_read() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    assert math.isnan(parse_json("NaN"))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "Expecting value at column 1"),
        (b'{"a": 1,}', "at column 9"),
        (b"[1,\n2,\n x]", "Expecting value at line 3, column 2"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice in one object"),
        (b'{"\\u0061": 1, "a": 2}', "the key 'a' stands twice"),
        (b'"\xff"', "it is not UTF-8: byte 0xff at offset 1"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"9" * 5000, "a whole number of thousands of digits"),
        (b"-" + b"9" * 5000, "a whole number of thousands of digits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_is_refused_with_the_cause(text: bytes, cause: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["[[], [], []]", '{"a": 1, "b": 2, "c": 3, "d": 4}', "[1, 2, 3, 4]"])
def test_a_text_of_too_many_values_is_refused_before_it_is_parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MOST_VALUES", 3)
    monkeypatch.setattr(json_text.json, "loads", lambda *args, **options: pytest.fail("it was parsed"))
    with pytest.raises(JsonError, match="more than 3 values"):
        parse_json(text)


def test_objects_are_found_at_any_depth() -> None:
    deep: object = {"name": "inmost"}
    for _ in range(5000):
        deep = [deep]
    found = list(objects_in({"a": deep, "b": [{"name": "other"}, 3]}))
    assert sorted(str(piece["name"]) for piece in found[1:]) == ["inmost", "other"]
