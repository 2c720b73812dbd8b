"""Every kind of tokenizer that the families have: what README shows works on each, whatever a trainer left in the file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import LogitDifference, expert_effects
from hooked_moe.tokenizer import Tokenizer

TEXT = "the sea is blue and the land is green; the whale is a fish of the sea. In 1851, the whale was naïve.\n"
SPACE = "▁"


def byte_level(*pre: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    """Byte-level BPE, as of OLMoE, Qwen and DeepSeek, which cut text up in different ways before."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([*pre, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 30, trainer)
    return backend


def sentencepiece(prefix: str, fallback: bool = True) -> tokenizers.Tokenizer:
    """As of Mixtral: a space belongs to the word after it, and stands before the first word too."""
    pieces = [SPACE + word for word in ("the", "sea", "is", "blue", "land", "whale", "a", "fish", "of", "and")]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(piece, -1.0) for piece in pieces] + [(letter, -6.0) for letter in letters] + [(byte, -9.0) for byte in bytes_]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=fallback))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


DIGITS = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), behavior="isolated")
WORDS = pre_tokenizers.Split(tokenizers.Regex(r"\p{P}| ?\p{L}+|\s+"), behavior="isolated")
KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "olmoe": byte_level,
    "qwen": lambda: byte_level(WORDS, normalizer=normalizers.NFC()),
    "deepseek": lambda: byte_level(DIGITS, WORDS),
    "mixtral": lambda: sentencepiece("normalizer"),
    "metaspace first": lambda: sentencepiece("first"),
    "metaspace always": lambda: sentencepiece("always"),
    "without bytes": lambda: sentencepiece("normalizer", fallback=False),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), bos_id=1, eos_id=2, pad_id=None)


@EVERY_KIND
@pytest.mark.parametrize("word", [" sea", " land", " whale"])
def test_a_word_after_a_space_is_found_as_the_token_that_it_is_in_a_text(word: str, kind: str) -> None:
    tokenizer = made(kind)
    in_a_text = tokenizer.encode(f"the{word} is", prepend_bos=False)
    assert tokenizer.to_single_token(word) == in_a_text[1]
    assert tokenizer.decode([in_a_text[0], in_a_text[1]]).endswith(word)


@EVERY_KIND
def test_what_is_several_tokens_is_none(kind: str) -> None:
    tokenizer = made(kind)
    for text in (" sea land", " seaward", " sea.", "  sea"):
        with pytest.raises(ValueError, match="tokens, not one"):
            tokenizer.to_single_token(text)


def test_an_unknown_character_is_no_token() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "sea": 1}, unk_token="[UNK]"))
    for tokenizer in (made("without bytes"), Tokenizer(words, None, None, None)):
        with pytest.raises(ValueError, match=r"is no token of this vocabulary, which reads it as '(<unk>|.UNK.)'"):
            tokenizer.to_single_token("鯨")
    assert Tokenizer(words, None, None, None).to_single_token("sea") == 1


@EVERY_KIND
@pytest.mark.parametrize("text", ["the sea is blue", "the whale is a fish of the sea", "sea"])
def test_tokens_one_by_one_are_the_text_together(text: str, kind: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(text, prepend_bos=False)
    pieces = tokenizer.to_str_tokens(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert tokenizer.decode(ids) == text


@EVERY_KIND
def test_what_the_readme_shows_works(kind: str, make_model: Callable[..., HookedMoE]) -> None:
    backend = KINDS[kind]()
    model = make_model(d_vocab=backend.get_vocab_size())
    model.tokenizer = Tokenizer(backend, bos_id=1, eos_id=2, pad_id=None)
    tokens = model.to_tokens("the whale is a fish of the sea")
    effects = expert_effects(model, tokens, [2], readouts=[LogitDifference(" sea", " land")])
    assert effects.readouts["logit_difference"].isfinite().any()
    assert len(model.to_str_tokens(tokens[0])) == tokens.shape[1]
    continued = model.generate("the whale", max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert continued.startswith("the whale")
    both = model(["the sea", "the land is blue"], return_type="loss", loss_per_token=True)
    assert both[1].isfinite().all()


# What a trainer left in the file


def with_settings(directory: Path, **settings: Any) -> Tokenizer:
    values = json.loads(KINDS["mixtral"]().to_str()) | settings
    (directory / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return Tokenizer.from_file(directory / "tokenizer.json", 1, 2)


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    expected = made("mixtral").encode(TEXT)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    tokenizer = with_settings(tmp_path, truncation=truncation, padding=padding | {"pad_token": "<unk>"})
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.pad([TEXT, "sea"], torch.device("cpu"))[1].sum(-1).tolist() == [len(expected), 2]
    tokenizer.backend.save(str(tmp_path / "saved.json"))
    saved = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None
    assert saved["padding"] is None


def test_settings_of_another_user_of_the_same_tokenizer_do_not_reach_ours() -> None:
    """transformers sets truncation and padding on its backend at every call, and leaves them there."""
    backend = KINDS["mixtral"]()
    tokenizer = Tokenizer(backend, 1, 2, None)
    expected = tokenizer.encode(TEXT)
    backend.enable_truncation(4)
    backend.enable_padding(length=300)
    assert tokenizer.encode(TEXT) == expected


def test_segmentation_at_random_is_switched_off_with_a_note() -> None:
    pairs = {"a": 0, "b": 1, "ab": 2}
    backend = tokenizers.Tokenizer(models.BPE(pairs, [("a", "b")], dropout=0.5))
    assert len({tuple(backend.encode("ababab").ids) for _ in range(40)}) > 1
    with pytest.warns(UserWarning, match="segments at random .dropout., which is for training: it is switched off"):
        tokenizer = Tokenizer(backend, None, None, None)
    assert {tuple(tokenizer.encode("ababab")) for _ in range(40)} == {(2, 2, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(tokenizers.Tokenizer(models.BPE(pairs, [("a", "b")])), None, None, None)


# Text that is none, and rows


@pytest.mark.usefixtures("unchecked")
def test_lone_surrogates_and_what_is_no_text_are_refused_wherever_text_comes_in(make_model: Callable[..., HookedMoE]) -> None:
    backend = KINDS["mixtral"]()
    model = make_model(d_vocab=backend.get_vocab_size())
    model.tokenizer = Tokenizer(backend, 1, 2, None)
    entrances: list[Callable[[Any], Any]] = [
        model.to_tokens,
        model,
        lambda text: model.generate(text, 1, stop_at_eos=False),
        lambda text: model(["the sea", text]),
        model.to_str_tokens,
        model.to_single_token,
        lambda text: expert_effects(model, text),
        lambda text: expert_effects(model, "the sea", readouts=[LogitDifference(text, " land")]),
        lambda text: model.run_variants(text, [("hook_embed", lambda x, hook: x)]),
    ]
    for enter in entrances:
        with pytest.raises(ValueError, match="this is no Unicode text: half of a surrogate pair"):
            enter("the \ud83d sea")
    for enter in entrances[:4]:
        for wrong in (None, 3, {"text": "the sea"}, [["the sea"]], b"the sea"):
            with pytest.raises(ValueError, match=r"expected a text|expected token ids|texts must be"):
                enter(wrong)


@pytest.mark.usefixtures("unchecked")
def test_texts_come_in_any_container(make_model: Callable[..., HookedMoE]) -> None:
    backend = KINDS["olmoe"]()
    model = make_model(d_vocab=backend.get_vocab_size())
    model.tokenizer = Tokenizer(backend, 1, 2, None)
    texts = ["the sea", "the land is blue"]
    with torch.no_grad():
        expected, tokens = model(texts), model.to_tokens(texts)
        for given in (tuple(texts), iter(texts), dict.fromkeys(texts, 0).keys(), map(str, texts)):
            again = list(given)
            assert torch.equal(model(iter(again)), expected)
            assert torch.equal(model.to_tokens(iter(again)), tokens)
            out = model.generate(iter(again), 2, do_sample=False, stop_at_eos=False, verbose=False)
            assert [text.startswith(prompt) for text, prompt in zip(out, texts, strict=True)] == [True, True]


@pytest.mark.usefixtures("unchecked")
def test_rows_do_not_run_together(make_model: Callable[..., HookedMoE]) -> None:
    backend = KINDS["olmoe"]()
    model = make_model(d_vocab=backend.get_vocab_size())
    tokenizer = model.tokenizer = Tokenizer(backend, 1, 2, None)
    texts = ["the sea", "the land"]
    rows = [tokenizer.encode(text) for text in texts]
    expected = [["the", " sea"], ["the", " land"]]
    assert model.to_str_tokens(texts) == expected
    assert model.to_str_tokens(rows) == expected
    assert model.to_str_tokens(torch.tensor(rows)) == expected
    assert model.to_str_tokens(torch.tensor(rows)[0]) == expected[0]
    assert model.to_str_tokens(rows[0]) == expected[0]
    assert model.to_str_tokens(texts[0]) == expected[0]
    assert model.to_string(torch.tensor(rows)) == texts
    assert model.to_string(rows) == texts
    assert model.to_string(torch.tensor(rows)[1]) == model.to_string(rows[1]) == texts[1]
    assert model.to_string(rows[0][1]) == model.to_string(torch.tensor(rows[0][1])) == " sea"
    with pytest.raises(ValueError, match="token ids must be"):
        model.to_string(torch.zeros(1, 1, 1, dtype=torch.long))
    for wrong in (torch.tensor([1.0]), [True], [1.5], None):
        for read in (model.to_string, model.to_str_tokens):
            with pytest.raises(ValueError, match="token ids must be"):
                read(wrong)


@pytest.mark.usefixtures("unchecked")
def test_a_tokenizer_of_another_library_is_refused() -> None:
    with pytest.raises(ValueError, match="transformers' fast ones have as backend_tokenizer, not str"):
        Tokenizer("bert", 1, 2, None)  # type: ignore[arg-type]
