"""What lies beside the weights: carried along when a model is saved, checked when it is read, and not left by another model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from hooked_moe import HookedMoE
from hooked_moe.generation import end_tokens
from hooked_moe.loading import CheckpointError

TINY = Path(__file__).parents[2] / "hooked_moe" / "pretrained" / "tiny-olmoe"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A chat model, with all that its makers put beside the weights."""
    directory = Path(shutil.copytree(TINY, tmp_path / "chat"))
    edit(directory / "config.json", eos_token_id=[7, 9], bos_token_id=5)
    edit(directory / "tokenizer_config.json", model_max_length=99, padding_side="left", extra_special_tokens={"tool": "the"})
    write(directory / "generation_config.json", {"eos_token_id": [9, 11], "temperature": 0.6, "do_sample": True})
    write(directory / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode() + b"\r\n")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    return directory


def edit(file: Path, **changes: Any) -> None:
    write(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


CARRIED = ["generation_config.json", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]


@pytest.mark.parametrize("stay", [False, True], ids=["elsewhere", "in place"])
def test_a_chat_model_that_is_pruned_and_saved_is_still_one(stay: bool, chat: Path, tmp_path: Path) -> None:
    before = {name: (chat / name).read_bytes() for name in CARRIED}
    stated = read(chat / "tokenizer_config.json")
    model = HookedMoE.from_pretrained(chat)
    model.remove_experts({layer: [0] for layer in range(6)})
    out = chat if stay else tmp_path / "pruned"
    model.save_pretrained(out)
    for name, content in before.items():
        same = read(out / name) == json.loads(content) if name.endswith(".json") else (out / name).read_bytes() == content
        assert same, name
    assert read(out / "tokenizer_config.json") == stated
    assert read(out / "config.json")["eos_token_id"] == [7, 9]
    again = HookedMoE.from_pretrained(out)
    assert end_tokens(again) == end_tokens(model) == (9, 11)
    assert again.cfg.eos_token_id == (7, 9)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.apply_chat_template([{"role": "user", "content": "the sea"}], tokenize=False).strip() == "the sea"
    assert theirs.padding_side == "left"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [9, 11]


def test_a_template_in_the_tokenizers_config_stays_there(chat: Path, tmp_path: Path) -> None:
    (chat / "chat_template.jinja").unlink()
    edit(chat / "tokenizer_config.json", chat_template=TEMPLATE)
    HookedMoE.from_pretrained(chat).save_pretrained(tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_nothing_of_another_model_stays(chat: Path, tmp_path: Path, make_model: Callable[..., HookedMoE]) -> None:
    """Its template, end tokens, vocabulary or adapter would be taken for the new model's. What is the user's own stays."""
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "adapter_config.json"):
        (chat / name).write_text("{}")
    for name in ("adapter_model.safetensors", "model-overlay.safetensors", "model-00001-of-00002.safetensors"):
        shutil.copy(chat / "model.safetensors", chat / name)
    for name in ("README.md", "notes.json", "probe.safetensors"):
        (chat / name).write_text("mine")
    make_model().save_pretrained(chat)
    kept = {"README.md", "notes.json", "probe.safetensors", "additional_chat_templates", "recipe.json", "evaluation.json"}
    assert {file.name for file in chat.iterdir()} == {"config.json", "model.safetensors"} | kept
    assert list((chat / "additional_chat_templates").iterdir()) == []
    assert HookedMoE.from_pretrained(chat).tokenizer is None


def test_the_vocabulary_of_slow_tokenizers_stays_beside_its_own_tokenizer_only(chat: Path, tmp_path: Path) -> None:
    (chat / "tokenizer.model").write_bytes(b"pieces")
    model = HookedMoE.from_pretrained(chat)
    model.save_pretrained(chat)
    assert (chat / "tokenizer.model").read_bytes() == b"pieces"
    other = Path(shutil.copytree(chat, tmp_path / "other"))
    model.save_pretrained(other)
    assert not (other / "tokenizer.model").exists()


def test_settings_of_a_trainer_are_not_saved(chat: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    edit(chat / "tokenizer.json", truncation=truncation)
    model = HookedMoE.from_pretrained(chat)
    assert model.to_tokens("the sea and the land " * 30).shape[1] > 100
    model.save_pretrained(tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer.json")["truncation"] is None


# Ids from files


@pytest.mark.parametrize("pad", [-1, 4096, 5000, 10**12, None])
def test_a_padding_id_that_has_no_embedding_is_not_used(pad: int | None, chat: Path) -> None:
    texts = ["the sea", "the land and the sea"]
    expected = HookedMoE.from_pretrained(TINY)
    edit(chat / "config.json", pad_token_id=pad)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        model = HookedMoE.from_pretrained(chat)
    assert len(noted) == (pad is not None and pad >= 4096)  # -1 is how some write that there is none
    assert all(f"pad_token_id={pad} is not in the vocabulary, 0 to 4095" in str(note.message) for note in noted)
    assert 0 <= int(model.to_tokens(texts).min()) <= int(model.to_tokens(texts).max()) < 4096
    with torch.no_grad():
        real = torch.tensor([[True, True, False, False, False], [True] * 5])
        torch.testing.assert_close(model(texts)[real], expected(texts)[real], atol=1e-4, rtol=0)  # padding is routed elsewhere
    written = model.generate(texts, 2, do_sample=False, stop_at_eos=False, verbose=False)
    assert written == expected.generate(texts, 2, do_sample=False, stop_at_eos=False, verbose=False)
    model.save_pretrained(chat)
    assert read(chat / "config.json")["pad_token_id"] == pad  # what the file said is not ours to correct


def test_padding_is_masked_so_that_its_id_may_be_anything() -> None:
    model = HookedMoE.from_pretrained(TINY)
    tokens, mask = torch.tensor([[5, 6, -100, 10**6], [5, 6, 7, 8]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    usual = tokens.masked_fill(mask == 0, 0)
    with torch.no_grad():
        given, expected = (model(t, "both", attention_mask=mask, loss_per_token=True) for t in (tokens, usual))
    assert torch.equal(given.logits[mask.bool()], expected.logits[mask.bool()])
    torch.testing.assert_close(given.loss, expected.loss, equal_nan=True, rtol=0, atol=0)
    with pytest.raises(ValueError, match="token id -100 is out of range"):
        model(tokens)
    with pytest.raises(ValueError, match="token id 1000000 is out of range"):
        model(tokens.clamp(min=0), attention_mask=torch.ones_like(mask))


def test_tokens_that_the_model_has_no_embedding_for_are_named(chat: Path) -> None:
    """An added token of a fine-tune whose embeddings were not enlarged."""
    values = read(chat / "tokenizer.json")
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"].append({"id": 4096, "content": "<tool>"} | added)
    write(chat / "tokenizer.json", values)
    model = HookedMoE.from_pretrained(chat)
    for run in (model, lambda text: model.generate(text, 1), lambda text: model([text, "the sea"])):
        with pytest.raises(ValueError, match="the tokenizer gives token id 4096, but chat has ids 0 to 4095: put the"):
            run("the <tool> sea")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id must be a whole number, not '</s>'"),
        ("generation_config.json", {"eos_token_id": [7, "9"]}, "eos_token_id must be a list of whole numbers"),
        ("generation_config.json", {"eos_token_id": 2.0}, "eos_token_id must be a whole number, not 2.0"),
        ("config.json", {"eos_token_id": [True]}, "eos_token_id must be a list of whole numbers"),
        ("config.json", {"pad_token_id": "0"}, "pad_token_id must be a whole number, not '0'"),
        ("config.json", {"bos_token_id": [1]}, "bos_token_id must be a whole number"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "add_bos_token must be true or false, not 'false'"),
        ("tokenizer_config.json", {"add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
    ],
    ids=repr,
)
def test_ids_and_switches_in_files_are_checked(file: str, changes: dict[str, Any], message: str, chat: Path) -> None:
    edit(chat / file, **changes)
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        HookedMoE.from_pretrained(chat)


def test_a_template_that_is_no_text_is_named(chat: Path) -> None:
    (chat / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not readable text in UTF-8"):
        HookedMoE.from_pretrained(chat)
