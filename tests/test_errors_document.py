"""docs/errors.md speaks of messages that the sources have, word by word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### `(.+)`$", DOCUMENT, flags=re.MULTILINE)
BLANK = "…"
"""Stands for a value: in a message of the document, and here for a placeholder of an f-string."""


def text_of(node: ast.expr) -> str:
    """A string as it is written, with blanks for what is put in; empty for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else BLANK for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ""


def messages() -> set[str]:
    """Every string of the sources, but for docstrings and comments."""
    found = set()
    for room in ("hooked_moe", "weights_conversion"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.expr) and not isinstance(node, ast.Expr):
                    found.add(text_of(node))
    return {text for text in found if " " in text}


MESSAGES = messages()


def is_written(entry: str) -> bool:
    """Whether some message has the words of an entry, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in entry.split(BLANK)), flags=re.DOTALL)
    return any(pattern.search(message) for message in MESSAGES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_message_of_the_document_is_in_the_sources(entry: str) -> None:
    assert sum(len(part.strip()) for part in entry.split(BLANK)) > 8, "too few words to find a message by"
    assert is_written(entry)


def test_a_message_that_no_source_has_is_found_out() -> None:
    assert not is_written("the experts of layer … have gone on a holiday")
    assert not is_written("… must be a list of whole numbers, as in [ … ], not the letter …")


def test_every_entry_says_what_it_is_about() -> None:
    sections = re.split(r"^### `.+`$", DOCUMENT, flags=re.MULTILINE)[1:]
    assert len(sections) == len(ENTRIES) > 40
    assert len(set(ENTRIES)) == len(ENTRIES)
    assert all(len(section.split("\n## ")[0].strip()) > 30 for section in sections)
