"""Chat templates: rendered and tokenized as transformers does, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooked_moe import HookedMoE
from hooked_moe.chat import ChatTemplate

pytestmark = pytest.mark.usefixtures("unchecked")

TEMPLATES = {file.stem: file.read_text() for file in (Path(__file__).parent / "support" / "chat_templates").iterdir()}
"""In the manner of the published ones."""
TALK = [
    {"role": "user", "content": "Where is <Paris>?"},
    {"role": "assistant", "content": "In Frànce.", "tool_calls": None},
    {"role": "user", "content": "  And Rome?\n"},
]
THOUGHT = [TALK[0], {"role": "assistant", "content": "In France.", "reasoning": "It is its capital."}, TALK[2]]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    HookedMoE.from_pretrained("tiny-olmoe").save_pretrained(directory)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **SPECIAL)


def directory_with(template: Any, directory: Path, **files: str) -> HookedMoE:
    """The shipped model, saved with a chat template in tokenizer_config.json and files besides."""
    HookedMoE.from_pretrained("tiny-olmoe").save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text()) | SPECIAL
    file.write_text(json.dumps(config if template is None else config | {"chat_template": template}))
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return HookedMoE.from_pretrained(directory)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "talk", [TALK, SYSTEM, TALK[:1], [TALK, TALK[:1]], THOUGHT], ids=["talk", "system", "one", "two talks", "thought"]
)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "enable_thinking": False, "tools": [{"name": "<f>"}]}])
def test_a_conversation_is_rendered_as_transformers_does(
    name: str, talk: list[Any], options: dict[str, Any], theirs: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    tokenizer = model.require_tokenizer()
    tokenizer.chat_template = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    options = {key: value for key, value in options.items() if name == "qwen3" or key != "tools"}
    expected = theirs.apply_chat_template(talk, chat_template=TEMPLATES[name], tokenize=False, **options)
    assert model.apply_chat_template(talk, tokenize=False, **options) == expected
    rows = theirs.apply_chat_template(talk, chat_template=TEMPLATES[name], return_dict=False, **options)
    rows = rows if isinstance(rows[0], list) else [rows]
    tokens = model.apply_chat_template(talk, **options)
    assert [row[: len(expected)].tolist() for row, expected in zip(tokens, rows, strict=True)] == rows


def test_templates_are_read_where_transformers_writes_them(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}]
    by_name = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
    for number, (template, files, expected) in enumerate(
        [
            ("{{ bos_token }}{{ messages[0].content }}", {}, "<|endoftext|>Hi"),
            ("old", {"chat_template.jinja": "{{ messages[0].role }}"}, "user"),
            (None, {"chat_template.jinja": "new"}, "new"),
            (by_name, {}, "default"),
        ]
    ):
        model = directory_with(template, tmp_path / str(number), **files)
        assert model.apply_chat_template(said, tokenize=False) == expected
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert hf.apply_chat_template(said, tokenize=False) == expected
    assert model.apply_chat_template(said, tokenize=False, tools=[]) == "tools"
    assert model.apply_chat_template(said, tokenize=False, chat_template="tool_use") == "tools"
    assert model.apply_chat_template(said, tokenize=False, chat_template="{{ eos_token }}!") == "<|endoftext|>!"
    with pytest.raises(ValueError, match=r"unknown chat template 'tool'; did you mean 'tool_use'"):
        model.apply_chat_template(said, chat_template="tool")


def test_text_is_what_a_user_says(tmp_path: Path) -> None:
    model = directory_with(TEMPLATES["olmoe"], tmp_path)
    one = model.to_tokens("Where is Paris?", chat=True)
    said = [{"role": "user", "content": "Where is Paris?"}]
    assert torch.equal(one, model.apply_chat_template(said, add_generation_prompt=True))
    assert model.to_string(one[0]) == "<|endoftext|><|user|>\nWhere is Paris?\n<|assistant|>\n"
    assert torch.equal(model.to_tokens(said, chat=True), one)
    two = model.to_tokens(["Where is Paris?", "Hello"], chat=True)
    assert torch.equal(two[:1], one)
    assert model.generate(one, 2, do_sample=False).shape == (1, one.shape[1] + 2)
    with pytest.raises(ValueError, match="leave out prepend_bos"):
        model.to_tokens("Hello", prepend_bos=True, chat=True)


def test_wrong_conversations_are_answered() -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    with pytest.raises(ValueError, match=r"this model has no chat template"):
        model.apply_chat_template(TALK)
    for messages, message in (
        ([], r"a conversation is a list of messages.*not \[\]"),
        ({"role": "user", "content": "x"}, r"a conversation is a list of messages.*not \{'content': 'x', 'role'"),
        ([{"content": "x"}], r"this message has no role: \{'content': 'x'\}"),
        ([{"role": "assistant", "content": "x"}], r"refuses these messages, or fails: roles must alternate"),
        ([{"role": "user", "content": torch.ones(1)}], r"are texts, numbers, lists and mappings, not Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply_chat_template(messages, chat_template=TEMPLATES["mixtral"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns._Namespace__attrs = 1 %}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ tojson }}{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content }}",
        "{% if %}",
        "{% include 'passwords' %}",
    ],
)
def test_a_template_can_do_nothing_but_text(template: str) -> None:
    with pytest.raises(ValueError, match=r"the chat template 'default' refuses these messages, or fails"):
        ChatTemplate({"default": template}).render(TALK)


@pytest.mark.parametrize("template", [3, [{"name": "x"}], {"default": 3}])
def test_what_is_no_template_is_refused(template: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be a text, or several by name"):
        directory_with(template, tmp_path)


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    directory_with(None, tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not readable text"):
        HookedMoE.from_pretrained(tmp_path)
