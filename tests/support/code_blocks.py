"""The Python in a document, as its reader would run it: block after block, in one namespace; and that in docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"(?:^    .*\n|^\n(?=    ))+", flags=re.MULTILINE)


def python_blocks(document: Path) -> list[tuple[int, str]]:
    """Every block, with the number of its first line."""
    text = document.read_text(encoding="utf-8")
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in BLOCK.finditer(text)]


def run_blocks(document: Path) -> dict[str, Any]:
    """Run all blocks; an error points to its line in the document. Returns what they defined."""
    namespace: dict[str, Any] = {}
    for line, source in python_blocks(document):
        exec(compile("\n" * (line - 1) + source, str(document), "exec"), namespace)
    return namespace


def example_of(documented: Any) -> str:
    """The indented lines of a docstring."""
    return textwrap.dedent("".join(EXAMPLE.findall(inspect.cleandoc(documented.__doc__ or "") + "\n")))


def run_example(documented: Any, names: Mapping[str, Any]) -> None:
    """Run the example of a docstring, which may use these names."""
    source = example_of(documented)
    assert source.strip(), f"{documented.__name__} has no example"
    exec(compile(source, f"docstring of {documented.__name__}", "exec"), dict(names))
