"""The chat template beside a checkpoint's tokenizer: chat_template.jinja, or else in tokenizer_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hooked_moe.chat import ChatTemplate
from hooked_moe.loading.checkpoint import read_json
from weights_conversion.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The chat template of a model directory; None where it has none. Files named as transformers names them, first those that it
    writes today. Raises `CheckpointError` for what cannot be read."""
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            special |= read_json(directory / name)
    stated = special.get("chat_template")
    files = {"default": directory / TEMPLATE_FILE}
    files |= {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    written = {name: _read(file) for name, file in files.items() if file.is_file()}
    if not written and stated is None:
        return None
    try:
        return ChatTemplate.of(written or stated, special, str(directory / "tokenizer_config.json"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not readable text: {error}") from error
