"""The documentation: pages and pictures that are made are those that their sources make now, and the site has what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from docs.tools import block_picture, columns, commands, hardware, notebook_pages, text_picture
from hooked_moe import HookedMoE, expert_effects, load_corpus
from hooked_moe.cli.main import COMMANDS
from hooked_moe.hooks.hook_table import HOOK_TABLE

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MAKE = {
    "block.svg": (block_picture.picture, "docs.tools.block_picture"),
    "columns.md": (columns.page, "docs.tools.columns"),
    "hardware.md": (hardware.page, "docs.tools.hardware"),
}


@pytest.mark.parametrize("name", MAKE)
def test_what_is_made_is_as_its_source_makes_it(name: str) -> None:
    make, module = MAKE[name]
    assert (DOCS / name).read_text(encoding="utf-8") == make(), f"write it again: python -m {module}"


def test_the_picture_of_a_block_has_every_hook_point_of_a_block() -> None:
    drawn = re.findall(r'class="name">([^<]+)<', (DOCS / "block.svg").read_text(encoding="utf-8"))
    expected = [spec.name.removeprefix("blocks.{i}.") for spec in HOOK_TABLE if spec.name.startswith("blocks.{i}.")]
    short = [re.sub(r"^(ln1|attn|ln2|mlp)\.", "", name) for name in expected]
    assert sorted(drawn) == sorted(short)
    assert f"{len(expected)} hook points" in (DOCS / "concepts.md").read_text(encoding="utf-8")


def test_the_coloured_passage_shows_what_the_shipped_model_does() -> None:
    """To the two digits that are shown, but for rounding."""
    model = HookedMoE.from_pretrained(text_picture.MODEL)
    (document,) = [document for document in load_corpus().documents if document.title == text_picture.DOCUMENT]
    tokens = model.to_tokens(document.text)[:, : text_picture.N_TOKENS + 1]
    effects = expert_effects(model, tokens, layers=[text_picture.LAYER])
    mine = effects.expert_index[0, 0, :-1] == text_picture.EXPERT
    measured = effects.delta_loss[0, 0, :-1][mine].tolist()
    words = [word for word, here in zip(model.to_str_tokens(tokens[0]), mine.any(-1).tolist(), strict=False) if here]
    measured = [effect for effect, word in zip(measured, words, strict=True) if "\n" not in word]  # a line's end is not drawn
    shown = re.findall(r"<title>[^<]*: ([+-][\d.]+) nats", (DOCS / "expert.svg").read_text(encoding="utf-8"))
    assert [float(value) for value in shown] == pytest.approx(measured, abs=0.006)


def test_the_readme_is_short_and_its_models_take_what_is_planned() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    for name in hardware.IN_README:
        assert hardware.row(name, ("h100",)) in readme


def test_the_page_of_commands_has_every_command() -> None:
    page = commands.page()
    for command in COMMANDS:
        assert f"## {command}\n" in page
        assert f"hooked-moe {command}" in page


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs.yml has no tags of its own."""

    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = set(re.findall(r"[\w/]+\.md", json.dumps(config["nav"])))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    notebooks = {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in DOCS.rglob("*.ipynb")}
    assert written | notebooks <= listed


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    picture = {"data": {"image/png": "iVBORw==", "text/plain": "<Figure>"}, "output_type": "display_data"}
    printed = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# First\n", "look"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [printed, picture]},
    ]
    notebook = tmp_path / "first.ipynb"
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page, pictures = notebook_pages.page_of(notebook, "someone/hooked_moe")
    assert page.startswith("# First\nlook\n\n[Download this notebook](first.ipynb)")
    assert "https://colab.research.google.com/github/someone/hooked_moe/blob/main/docs/notebooks/first.ipynb" in page
    assert "```python\nprint(1)\n```\n\n```text\none\ntwo\n```" in page
    assert pictures == {"first_0.png": b"\x89PNG"}
    assert "colab" not in notebook_pages.page_of(notebook)[0]
