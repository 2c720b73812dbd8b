"""The examples of documents and docstrings run as they stand."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hooked_moe import HookedMoE, figures, load_corpus, routing
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.measurement import TokenizedCorpus, open_measurement
from tests.support.code_blocks import python_blocks, run_blocks, run_example

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    "README.md",
    *(f"docs/{name}.md" for name in ("index", "guide", "cookbook", "experiments", "results", "adding_a_criterion", "routing")),
)
"""Pages whose blocks run from top to bottom, one after another."""
FUNCTIONS = [function for name in routing.__all__ if inspect.isfunction(function := getattr(routing, name))]

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def criteria_of_a_page_end_with_it() -> Iterator[None]:
    with mock.patch.dict(CRITERIA):
        yield


@pytest.mark.parametrize("name", RUN)
def test_the_blocks_of_a_page_run_one_after_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / name)


def test_an_error_in_a_block_names_the_line_of_the_document(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("A page.\n\n```python\nx = 1\n```\n\nText.\n\n```python\ny = x + 1\nz = y / 0\n```\n")
    assert [line for line, _ in python_blocks(page)] == [4, 10]
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 10  # counted from 0


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples of `hooked_moe.routing` take for granted."""
    model = HookedMoE.from_pretrained("tiny-olmoe")
    documents = [dataclasses.replace(document, text=document.text[:200]) for document in load_corpus().documents[:3]]
    corpus = dataclasses.replace(load_corpus(), documents=documents)
    tokens = model.to_tokens("In the beginning God created the heavens and the earth")
    with open_measurement(model, TokenizedCorpus(model, corpus, 64, 24), results=tmp_path_factory.mktemp("results")) as run:
        run.require("position", progress=False)
    return {name: getattr(routing, name) for name in routing.__all__} | {
        "model": model,
        "base": model,
        "instruct": model,
        "corpus": corpus,
        "load_corpus": lambda name: corpus,
        "table": routing.routing_table(model, corpus),
        "tokens": tokens,
        "mask": torch.ones_like(tokens),
        "clean": tokens,
        "corrupted": tokens.flip(1),
        "metric": lambda logits: logits[:, -1, 0],
        "pairs": [(one.text, other.text) for one, other in itertools.pairwise(documents)],
        "run": SimpleNamespace(directory=run.directory),
    }


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_public_function_of_routing_has_an_example_that_runs(
    function: Any, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_example(function, names)


def test_the_example_of_the_heat_map_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_example(figures.heat_map, {"heat_map": figures.heat_map, "effects": np.eye(2, 16)})
    assert (tmp_path / "effects.png").exists()
