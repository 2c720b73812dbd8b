"""A tokenizer.json may not end the process, nor fail in a way that nobody can catch."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import hooked_moe
from hooked_moe import HookedMoE
from hooked_moe.loading.registry import SHIPPED
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.tokenizer_file import named_failures

PRETRAINED = Path(hooked_moe.__file__).parent / "pretrained"
PLAIN: dict[str, Any] = json.loads((PRETRAINED / "tiny-olmoe" / "tokenizer.json").read_text(encoding="utf-8"))
TEXT = "the sea and the land aaaaaa"
SEQUENCE, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "S", "type_id": 0}}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(*single: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    special = {"S": {"id": "S", "ids": [0] * ids, "tokens": ["<|endoftext|>"] * ids}}
    return {"type": "TemplateProcessing", "single": list(single), "pair": [SEQUENCE, SEQUENCE], "special_tokens": special}


def charsmap(size: int, held: int) -> dict[str, Any]:
    """A SentencePiece normalizer whose table says that it has so many bytes."""
    data = size.to_bytes(4, "little") + bytes(held) + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def written(directory: Path, **sections: Any) -> Path:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(copy.deepcopy(PLAIN) | sections), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("sections", "cause"),
    [
        ({"normalizer": replace({"String": "a"}, "a" * 100)}, "its normalizer can make a text 100 times longer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaa")] * 5}}, "243 times longer"),
        ({"normalizer": replace({"Regex": "a*"}, "x" * 64)}, "its normalizer can make a text 65 times longer"),
        ({"decoder": replace({"String": ""}, "x" * 64)}, "its decoder can make a text 65 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 100}}, "its normalizer can make a text 101 times longer"),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "aaaaaaaaa")] * 2}},
            "its decoder can make a text 81",
        ),
        ({"post_processor": template(*[SEQUENCE] * 65)}, "its post_processor can make a text 65 times longer"),
        (
            {"post_processor": {"type": "Sequence", "processors": [template(*[SEQUENCE] * 9)] * 2}},
            "its post_processor can make a text 81 times longer",
        ),
        ({"post_processor": template(*[SPECIAL] * 20, SEQUENCE, ids=20)}, "puts 400 tokens around every text"),
        ({"normalizer": charsmap(2**32 - 1, 4)}, "precompiled_charsmap is not one, or is shorter than it says"),
        ({"normalizer": {"type": "Sequence", "normalizers": [charsmap(16, 4)]}}, "precompiled_charsmap is not one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w"}}, "precompiled_charsmap is not one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "precompiled_charsmap is not one"),
        (
            {"added_tokens": [PLAIN["added_tokens"][0] | {"content": "\x1b[2J" * 1000}]},
            "an added token has 4,000 characters (256 at most): '\\x1b[2J",
        ),
        ({"model": {"type": "Nothing"}}, "is not a readable tokenizer.json"),
        ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}, "is not a readable tokenizer.json"),
    ],
    ids=range(16),
)
def test_a_file_that_no_text_would_survive_is_refused(sections: dict[str, Any], cause: str, tmp_path: Path) -> None:
    file = written(tmp_path, **sections)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Tokenizer.from_file(file)
    assert str(file) in str(caught.value)
    assert cause in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "sections",
    [
        {"normalizer": replace({"String": ""}, "x")},
        {"normalizer": replace({"Regex": "(a+)+$"}, "x")},
        {"normalizer": charsmap(0, 0)},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"post_processor": template(SPECIAL, {"Sequence": {"id": "B", "type_id": 0}})},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["q", 0.0]]}},
        {"model": {"type": "WordLevel", "unk_token": "q", "vocab": {"a": 0}}},
    ],
    ids=range(7),
)
def test_what_goes_wrong_only_with_a_text_is_a_value_error(sections: dict[str, Any], tmp_path: Path) -> None:
    """Half of these are panics, which `except Exception` does not catch."""
    tokenizer = Tokenizer.from_file(written(tmp_path, **sections))
    with pytest.raises(ValueError, match="the tokenizer cannot encode 'the sea and the land"):
        tokenizer.encode(TEXT + " " + "a" * 60 + "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("x"), MemoryError()], ids=repr)
def test_what_is_not_the_librarys_own_failure_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, named_failures("decoding"):
        raise error
    assert caught.value is error


def test_a_panic_becomes_a_value_error_and_keeps_its_cause() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
    with pytest.raises(ValueError, match="decoding: chunk size must be non-zero") as caught, named_failures("decoding"):
        backend.encode("abc")
    assert type(caught.value.__cause__).__name__ == "PanicException"


@pytest.mark.parametrize(
    "sections",
    [
        {"padding": {"strategy": {"Fixed": 3_000_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "x"}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}},
    ],
)  # fmt: skip
def test_padding_and_truncation_of_a_file_have_no_effect(sections: dict[str, Any], tmp_path: Path) -> None:
    assert Tokenizer.from_file(written(tmp_path, **sections)).encode(TEXT) == Tokenizer.from_file(written(tmp_path)).encode(TEXT)


@pytest.mark.parametrize(
    "sections",
    [
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [replace({"Regex": " {2,}"}, " "), replace({"String": " "}, "\u2581")],
            }
        },
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "``"}, '"'), replace({"String": "''"}, '"')]}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")],
            }
        },
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [replace({"String": "\u2581"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
            }
        },
        {"post_processor": template(SPECIAL, SEQUENCE, SPECIAL)},
        {"normalizer": charsmap(2048, 2048)},
    ],
    ids=range(6),
)
def test_what_published_tokenizers_do_is_accepted_and_unchanged(sections: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, **sections)
    assert Tokenizer.from_file(file).encode(TEXT) == tokenizers.Tokenizer.from_file(str(file)).encode(TEXT).ids


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tokenizers_are_those_of_the_library(name: str) -> None:
    file = PRETRAINED / name / "tokenizer.json"
    assert json.loads(Tokenizer.from_file(file).backend.to_str()) == json.loads(
        tokenizers.Tokenizer.from_file(str(file)).to_str()
    )


def test_a_template_with_ids_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(PRETRAINED / "tiny-olmoe", tmp_path / "model"))
    sections = {"S": {"id": "S", "ids": [5000], "tokens": ["x"]}}
    written(directory, post_processor=template(SPECIAL, SEQUENCE) | {"special_tokens": sections})
    with pytest.raises(ValueError, match="gives token id 5000, but model has ids 0 to 4095"):
        HookedMoE.from_pretrained(directory)(TEXT)
