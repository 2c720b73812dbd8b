"""The benchmark of the GPU, tried on a CPU. Nothing here is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.usefixtures("unchecked")


def test_every_kernel_has_a_row_and_the_audit_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    named = ["route", "group_by_expert", "gather_rows", "swiglu", "masked_combine", "prefix_attention", "target_loss"]
    assert [row for row in rows if row in named] == named
    assert rows[-1] == "the released run of 20 cells"
    assert "| one text | 124 |" in printed  # (32 - 1) positions, 2 experts, 2 layers


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--help"])
    assert stopped.value.code == 0
    assert "python -m benchmarks.gpu --small" in capsys.readouterr().out
