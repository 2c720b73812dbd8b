"""Chat templates: the text that a list of messages is to an instruction-tuned model.

A template is Jinja2, run as transformers runs it: with its helpers, in a sandbox that lets it read plain values and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hooked_moe.checks import quoted, unknown_name

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}, and whatever else a template reads."""


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a checkpoint by their names, of which "default" is used where none is named, and its special tokens."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """As templates know them: {"bos_token": "<s>", ...}."""

    @classmethod
    def of(cls, stated: Any, special_tokens: Mapping[str, Any], source: str) -> ChatTemplate:
        """From the `chat_template` of a tokenizer's config: a text, a mapping of names to texts, or a list of such entries.

        Special tokens may be texts or objects with a "content". Raises `ValueError`, with the `source`, for something else.
        """
        if isinstance(stated, str):
            stated = {"default": stated}
        elif isinstance(stated, list) and all(
            isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in stated
        ):
            stated = {entry["name"]: entry["template"] for entry in stated}
        if not isinstance(stated, Mapping) or not all(isinstance(text, str) for text in (*stated, *stated.values())):
            raise ValueError(f"{source}: chat_template must be a text, or several by name, not {type(stated).__name__}")
        contents = {
            name: token.get("content") if isinstance(token, Mapping) else getattr(token, "content", token)
            for name, token in special_tokens.items()
        }
        texts = {name: text for name, text in contents.items() if name.endswith("_token") and isinstance(text, str)}
        return cls(dict(stated), texts)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, template: str | None = None, **variables: Any
    ) -> str:
        """The text of a conversation, up to where the assistant answers with `add_generation_prompt`.

        `variables` are what else the template reads (`tools`, `documents`, `enable_thinking`, ...), as plain values. Raises
        `ValueError` for messages that the template refuses and for a template that fails.
        """
        name = template or ("tool_use" if variables.get("tools") is not None and "tool_use" in self.sources else "default")
        if name not in self.sources:
            raise unknown_name("chat template", name, self.sources, f"There are {', '.join(map(repr, self.sources))}.")
        given_by_key = ({key: value for key, value in message.items() if value is not None} for message in checked(messages))
        said = [_plain(_with_reasoning(message)) for message in given_by_key]
        given = _plain({"tools": None, "documents": None, **self.special_tokens, **variables})
        try:
            return _compiled(self.sources[name]).render(messages=said, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the chat template {quoted(name)} refuses these messages, or fails: {error}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has one of its names has it under those that templates read, as in transformers."""
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def rendered(templates: ChatTemplate | None, conversations: Any, chat_template: str | None = None, **options: Any) -> list[str]:
    """The texts of one conversation or of several.

    A text alone stands for what a user says: "Hello" for [{"role": "user", "content": "Hello"}], and a list of texts for as many
    conversations. `chat_template` is a template, or the name of one of the checkpoint's. Options are those of
    `ChatTemplate.render`. Raises `ValueError` where there is no template.
    """
    if chat_template is not None and "{" in chat_template:
        templates, chat_template = ChatTemplate({"default": chat_template}, templates.special_tokens if templates else {}), None
    if templates is None:
        raise ValueError(
            "this model has no chat template, as those have that are tuned to follow instructions: give it plain text, or pass "
            "chat_template="
        )
    several = conversations if are_several(conversations) else [conversations]
    each = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in several]
    return [templates.render(messages, template=chat_template, **options) for messages in each]


def are_several(conversations: Any) -> bool:
    """A list whose items are conversations: texts or lists of messages."""
    return isinstance(conversations, list | tuple) and len(conversations) > 0 and isinstance(conversations[0], str | list | tuple)


def checked(messages: Any) -> Sequence[Message]:
    """The messages of one conversation. Raises `ValueError` for what is none."""
    expected = "a conversation is a list of messages, as [{'role': 'user', 'content': 'Hello'}]"
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"{expected}, not {quoted(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"{expected}; this message has no role: {quoted(message)}")
    return messages


def _plain(value: Any) -> Any:
    """The value of JSON's types alone: what a template may see has no methods that could do anything."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise ValueError(f"messages and template variables are texts, numbers, lists and mappings, not {type(value).__name__}")


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.globals["dict"] = lambda *entries, **values: dict(*entries, **values)  # not the type, which has attributes
    sandbox.globals["namespace"] = _Namespace
    return sandbox.from_string(source)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it passes them on."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja2's, without the names that begin with an underscore, through which its insides could be written to."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not set {quoted(name)}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
