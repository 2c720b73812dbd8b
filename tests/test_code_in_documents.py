"""The examples of the documents run as they stand, and so does every example in a docstring that names what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.code_blocks import python_blocks, run_blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUN = ("routing.md",)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", RUN)
def test_the_blocks_of_a_page_run_one_after_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / name)


def test_an_error_in_a_block_names_the_line_of_the_document(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("A page.\n\n```python\nx = 1\n```\n\nText.\n\n```python\ny = x + 1\nz = y / 0\n```\n")
    assert [line for line, _ in python_blocks(page)] == [4, 10]
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 10  # counted from 0
