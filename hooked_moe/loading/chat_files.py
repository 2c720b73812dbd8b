"""The chat template among a tokenizer's files: chat_template.jinja, or else in tokenizer_config.json."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from hooked_moe.chat import ChatTemplate
from hooked_moe.json_text import parse_json
from hooked_moe.tokenizer import TokenizerFiles
from weights_conversion.errors import CheckpointError


def chat_template_of(files: TokenizerFiles) -> ChatTemplate | None:
    """The chat template of a model; None where it has none. Of the files where transformers keeps one, those that it writes today
    come first. Raises `CheckpointError` for what is no template."""
    written = {PurePosixPath(name).stem: text for name, text in files.others.items() if name.endswith(".jinja")}
    if "chat_template" in written:
        written = {"default": written.pop("chat_template")} | written
    stated = written or files.config.get("chat_template")
    if not stated:
        return None
    try:
        special: dict[str, Any] = parse_json(files.others.get("special_tokens_map.json", "{}"))
        return ChatTemplate.of(stated, special | dict(files.config), f"{files.directory}: tokenizer_config.json")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{files.directory}: special_tokens_map.json or the chat template cannot be read: {error}"
        ) from error
