"""Small programs that once failed in silence, kept beside the repository where it is developed: each ends well."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch

CASES = sorted((Path(__file__).parents[2] / "shared" / "cases").glob("*.py")) or [None]
SLOW = ("25_compile_float32", "35_means_under_default_dtype")
"""What `test_compile.py` and `test_torch_defaults.py` check on smaller models."""


@pytest.mark.skipif(CASES == [None], reason="the programs are not part of the repository")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case and case.stem in SLOW else []) for case in CASES],
    ids=lambda case: case.stem if case else "none",
)
def test_the_program_ends_well(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "TMPDIR", str(tmp_path))
    before = torch.get_default_dtype()
    try:
        runpy.run_path(str(case), run_name="__main__")
    except SystemExit as end:
        pytest.fail(str(end.code)) if end.code else None
    finally:
        torch.set_default_dtype(before)
