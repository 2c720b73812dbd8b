"""Docstrings as Markdown: an example with `>>>` becomes a block of code, as an indented one is already."""

from __future__ import annotations

import re
from typing import Any

import griffe

SESSION = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", flags=re.MULTILINE)
"""A first line with a prompt, and what follows it up to an empty line."""


class FenceSessions(griffe.Extension):
    """Loaded by mkdocstrings (`extensions` in mkdocs.yml)."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    return SESSION.sub(lambda session: f"```pycon\n{session[0]}\n```", text)
