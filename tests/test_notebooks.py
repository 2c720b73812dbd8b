"""The notebooks run from top to bottom, and what they keep of it is little, and no error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from docs.tools.notebook_pages import NOTEBOOKS, cells_of

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "your_own_model":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(NOTEBOOKS / f"{name}.ipynb")):
        exec(compile(cell, f"{name}.ipynb, code cell {number}", "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_keeps_is_small_and_no_error(name: str) -> None:
    file = NOTEBOOKS / f"{name}.ipynb"
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert file.stat().st_size < 150_000
    assert sum(bool(cell["outputs"]) for cell in cells) >= 2
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert "/tmp/" not in json.dumps(cells)  # no path of the machine that ran it


def test_there_are_six() -> None:
    assert len(NAMES) == 6
