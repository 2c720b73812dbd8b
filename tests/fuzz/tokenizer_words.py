"""Parts of a tokenizer.json that mean something, with settings that hurt, and where they stand: for the mutations."""

from __future__ import annotations

from typing import Any


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _template(*single: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    tokens = {"A": {"id": "A", "ids": [0] * ids, "tokens": ["a"] * ids}}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": tokens}


_TEXT, _OTHER = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
_SPECIAL = {"SpecialToken": {"id": "A", "type_id": 0}}
_GROWING = _replace({"String": "a"}, "a" * 100)
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

NORMALIZERS: tuple[Any, ...] = (
    *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "ByteLevel", "Nmt", "Nothing")),
    _GROWING,
    {"type": "Sequence", "normalizers": [_GROWING] * 5},
    {"type": "Sequence", "normalizers": [_replace({"Regex": "."}, "ab")] * 40},
    _replace({"String": ""}, "x"),
    _replace({"Regex": ""}, "x" * 10),
    _replace({"Regex": "(a+)+$"}, "x"),
    _replace({"Regex": "("}, "x"),
    _replace({"String": " "}, "\u2581"),
    {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    *(
        {"type": "Precompiled", "precompiled_charsmap": text}
        for text in ("", "AAAA", "/////w==", "/////w", "BAAAAAAAAAA=", "AAAAgAAA")
    ),
    {"precompiled_charsmap": "/////wAAAAAAAAAA"},
)
PRE_TOKENIZERS: tuple[Any, ...] = (
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Removed", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
    *({"type": "FixedLength", "length": length} for length in (0, 1, 2**62)),
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Digits", "individual_digits": True},
)
DECODERS: tuple[Any, ...] = (
    *({"type": kind} for kind in ("Fuse", "ByteFallback", "ByteLevel")),
    {"type": "Sequence", "decoders": [_GROWING] * 5},
    {"type": "Strip", "content": "a", "start": 2**62, "stop": 2**62},
    {"type": "WordPiece", "prefix": "x" * 1000, "cleanup": True},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
)
PROCESSORS: tuple[Any, ...] = (
    _template(_SPECIAL, _TEXT),
    _template(_SPECIAL, _OTHER),
    _template(_TEXT, _TEXT),
    _template(*[_SPECIAL] * 2000, _TEXT, ids=2000),
    _template(*[_TEXT] * 1000),
    {"type": "Sequence", "processors": [_template(*[_TEXT] * 30)] * 5},
    {"type": "BertProcessing", "sep": ["a", 2**32 - 1], "cls": ["b", 0]},
    {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 0], "trim_offsets": True, "add_prefix_space": True},
)
PADDINGS: tuple[Any, ...] = tuple(
    {"strategy": strategy, "direction": "Right", "pad_to_multiple_of": multiple, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    for strategy, multiple in (({"Fixed": 3_000_000_000}, None), ("BatchLongest", 2**40), ({"Fixed": 2**63}, 0))
)
TRUNCATIONS: tuple[Any, ...] = (
    {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9},
    {"direction": "Right", "max_length": 0, "strategy": "OnlySecond", "stride": 0},
)
MODELS: tuple[Any, ...] = (
    {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["", 1e308]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": True},
    {
        "type": "WordPiece",
        "unk_token": "z",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 2**60,
        "vocab": {"a": 0},
    },
    {"type": "WordLevel", "unk_token": "z", "vocab": {"a": 2**32 - 1}},
    {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**32 - 1}},
    {"type": "BPE", "dropout": 1.0, "unk_token": "z", "vocab": {"a": 0, "b": 1}, "merges": []},
    {"type": "BPE", "unk_token": "a", "vocab": {"a": 70_000}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]], "byte_fallback": True, "continuing_subword_prefix": "x" * 10_000},
)
ADDED: tuple[Any, ...] = (
    [{"id": 2**32 - 1, "content": "sea", **_ADDED}],
    [{"id": 0, "content": "", **_ADDED}],
    [{"id": 5, "content": "\x1b[2J" * 30_000, **_ADDED}],
    [{"id": 300 + i, "content": f"token{i}", **_ADDED} for i in range(2000)],
)
TOKENIZER_WORDS: tuple[tuple[str, Any], ...] = tuple(
    (section, word)
    for section, words in {
        "normalizer": NORMALIZERS,
        "pre_tokenizer": PRE_TOKENIZERS,
        "decoder": DECODERS,
        "post_processor": PROCESSORS,
        "padding": PADDINGS,
        "truncation": TRUNCATIONS,
        "model": MODELS,
        "added_tokens": ADDED,
    }.items()
    for word in words
)
