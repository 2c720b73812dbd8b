"""Text in, text out: a tokenizer trained here, and a model that reads text with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from hooked_moe import HookedMoE
from hooked_moe.tokenizer import Tokenizer

TEXT = "The whale swam past the ship; the ship followed the whale. 19 sailors — naïve, all — watched.\n"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(file, bos_id=0, eos_id=0, pad_id=None)


@pytest.fixture
def reader(tokenizer: Tokenizer, make_model: Callable[..., HookedMoE]) -> HookedMoE:
    """A model that reads text."""
    model = make_model(d_vocab=300)
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("text", [TEXT, "whale", " ship", "\t\n  two  spaces ", "鯨 🐋", "naïve"])
def test_text_survives_a_round_trip(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_several_texts_are_padded_on_the_right(tokenizer: Tokenizer) -> None:
    texts = ["The whale swam past the ship", "ship", "The whale"]
    ids, real = tokenizer.pad(texts, torch.device("cpu"))
    for row, mask, text in zip(ids, real, texts, strict=True):
        expected = tokenizer.encode(text)
        assert row[mask].tolist() == expected
        assert mask.tolist() == [True] * len(expected) + [False] * (len(mask) - len(expected))
        assert (row[~mask] == tokenizer.pad_id).all()
    assert real.any(0).all()


def test_padding_takes_the_first_special_id_there_is(file: Path) -> None:
    assert Tokenizer.from_file(file, eos_id=7, pad_id=3).pad_id == 3
    assert Tokenizer.from_file(file, eos_id=7).pad_id == 7
    assert Tokenizer.from_file(file).pad_id == 0


def test_a_text_begins_with_bos_where_asked_or_where_the_checkpoint_says(
    tokenizer: Tokenizer, file: Path, tmp_path: Path
) -> None:
    plain = tokenizer.encode("whale")
    assert tokenizer.encode("whale", prepend_bos=True) == [0, *plain]
    assert tokenizer.encode("whale", prepend_bos=False) == plain
    with_bos = tokenizers.Tokenizer.from_file(str(file))
    with_bos.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    with_bos.save(str(tmp_path / "tokenizer.json"))
    says = Tokenizer.from_file(tmp_path / "tokenizer.json", bos_id=0)
    assert says.encode("whale") == [0, *plain]
    assert says.encode("whale", prepend_bos=False) == plain
    assert says.encode("whale", prepend_bos=True) == [0, *plain]
    with pytest.raises(ValueError, match="no BOS token; use prepend_bos=False or None"):
        Tokenizer.from_file(file).encode("whale", prepend_bos=True)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("stated", [True, False, None])
def test_what_the_tokenizer_config_says_of_bos_outweighs_the_template(
    stated: bool | None, template: bool, file: Path, make_model: Callable[..., HookedMoE], tmp_path: Path
) -> None:
    """DeepSeek-V2's tokenizer.json has no BOS, and its tokenizer_config.json says `add_bos_token: true`."""
    model = make_model(d_vocab=300, bos_token_id=0, qkv_bias=False, output_bias=False, clip_qkv=None)
    backend = tokenizers.Tokenizer.from_file(str(file))
    if template:
        backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    model.tokenizer = Tokenizer(backend, 0, None, None, adds_bos=stated)
    model.save_pretrained(tmp_path)
    loaded = HookedMoE.from_pretrained(tmp_path)
    plain = backend.encode("whale", add_special_tokens=False).ids
    adds = template if stated is None else stated
    assert loaded.to_tokens("whale").tolist() == [[0, *plain] if adds else plain]
    assert loaded.to_tokens("whale", prepend_bos=False).tolist() == [plain]
    assert loaded.to_tokens("whale", prepend_bos=True).tolist() == [[0, *plain]]


def test_a_single_token_is_found_and_several_are_shown(reader: HookedMoE, tokenizer: Tokenizer) -> None:
    token = reader.to_single_token(" whale")
    assert tokenizer.decode([token]) == " whale"
    with pytest.raises(ValueError, match=r"'whale!' is \d+ tokens, not one: \[.*'!'\]"):
        reader.to_single_token("whale!")
    with pytest.raises(ValueError, match=r"'' is 0 tokens"):
        reader.to_single_token("")


def test_text_and_its_tokens_give_the_same_logits(reader: HookedMoE) -> None:
    tokens = reader.to_tokens(TEXT)
    with torch.no_grad():
        assert torch.equal(reader(TEXT), reader(tokens))
        assert torch.equal(reader(TEXT, return_type="loss"), reader(tokens, return_type="loss"))


def test_several_texts_are_masked_as_each_alone(reader: HookedMoE) -> None:
    texts = [TEXT, "The whale", "ship"]
    with torch.no_grad():
        together = reader(texts)
        losses = reader(texts, return_type="loss", loss_per_token=True)
        for row, loss, text in zip(together, losses, texts, strict=True):
            alone = reader(text)[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)
            expected = reader(text, return_type="loss", loss_per_token=True)[0]
            torch.testing.assert_close(loss[: len(expected)], expected, atol=1e-5, rtol=1e-5)
            assert loss[len(expected) :].isnan().all()


def test_tokens_are_shown_as_strings(reader: HookedMoE) -> None:
    tokens = reader.to_tokens("The whale swam")
    assert reader.to_str_tokens("The whale swam") == reader.to_str_tokens(tokens[0])
    assert reader.to_str_tokens("", prepend_bos=False) == []
    assert "".join(reader.to_str_tokens("The whale swam")) == "The whale swam"
    assert reader.to_str_tokens("whale", prepend_bos=True)[0] == END
    assert reader.to_string(tokens) == ["The whale swam"]
    assert reader.to_string(tokens[0]) == "The whale swam"
    assert reader.to_string(tokens[0].tolist()) == "The whale swam"
    assert reader.to_string(int(tokens[0, 0])) == reader.to_str_tokens("The whale swam")[0]


def test_a_model_without_a_tokenizer_says_so(model: HookedMoE) -> None:
    for call in (model, model.to_tokens, model.to_str_tokens, model.to_single_token):
        with pytest.raises(ValueError, match="no tokenizer: pass token ids"):
            call("whale")


def test_texts_without_tokens_are_refused(reader: HookedMoE) -> None:
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        reader(["whale", ""])
    with pytest.raises(ValueError, match="no texts given"):
        reader([])
    with pytest.raises(ValueError, match="goes with tokens"):
        reader("whale", attention_mask=torch.ones(1, 5, dtype=torch.long))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"absent.json is not a readable"):
        Tokenizer.from_file(tmp_path / "absent.json")
