"""`hooked-moe trace` end to end: tables, findings and a page, and the same again from the same command."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv
import pytest

from hooked_moe.circuits.tracing import TracingResult
from hooked_moe.cli.main import main

NULLS = pyarrow.csv.ConvertOptions(null_values=[""])
SMALL = ["--cases", "24", "--min-cases", "12", "--corruption", "noise"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert main(["trace", *SMALL, "--results", str(results)]) == 0
    (run,) = (results / "tiny-olmoe-facts").iterdir()
    return run


def test_it_writes_every_patch_the_findings_and_a_page(directory: Path) -> None:
    result = TracingResult.load(directory)
    assert result.cases.num_rows == 24
    assert directory.name.startswith("trace-embedded-noise-")
    found = pyarrow.csv.read_csv(directory / "findings.csv").to_pylist()
    chosen = result.selection
    assert chosen is not None
    assert {"layer": chosen.layer, "expert": chosen.expert} in [{k: row[k] for k in ("layer", "expert")} for row in found]
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert f"expert {chosen.expert} of layer {chosen.layer}" in page
    assert f"<td>L{chosen.layer}E{chosen.expert}</td>" in page  # with its controls
    assert "at equal length" in page
    assert "Facts that were left out" in page
    assert "<script" not in page
    assert (directory / "figures" / "tracing.csv").is_file()


def test_the_same_command_writes_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    assert main(["trace", *SMALL, "--results", str(tmp_path)]) == 0
    again = tmp_path / "tiny-olmoe-facts" / directory.name
    names = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [name for name in names if (directory / name).read_bytes() != (again / name).read_bytes()] == []


def test_every_token_from_the_subject_on_has_its_own_findings(tmp_path: Path) -> None:
    options = ["--cases", "12", "--min-cases", "8", "--positions", "all", "--corruption", "noise", "--foils", "prior"]
    assert main(["trace", *options, "--results", str(tmp_path)]) == 0
    (run,) = (tmp_path / "tiny-olmoe-facts").iterdir()
    result = TracingResult.load(run)
    assert result.places[-1] == "final"
    found = pyarrow.csv.read_csv(run / "findings.csv").to_pylist()
    assert {row["place"] for row in found} == {"", *result.places}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Where in the prompt the answer comes back" in page
    assert "Logits that the MLP output restores, by the patched token" in page
    assert "last token of the subject: layer 0" in page
    figure = pyarrow.csv.read_csv(run / "figures" / "tracing.csv").to_pylist()
    assert {row["place"] for row in figure if row["quantity"] == "attention output"} == set(result.places)
    assert "foils as likely as the true answer without the subject" in page


def test_a_place_that_hardly_any_prompt_has_is_left_out_of_the_page(tmp_path: Path) -> None:
    """Few subjects of associations have a token in the middle."""
    options = ["--model", "tiny-olmoe", "--facts", "associations", "--cases", "16", "--min-cases", "8", "--positions", "all"]
    assert main(["trace", *options, "--results", str(tmp_path)]) == 0
    (run,) = (tmp_path / "tiny-olmoe").iterdir()
    found = pyarrow.csv.read_csv(run / "findings.csv", convert_options=NULLS).to_pylist()
    scarce = {row["place"] for row in found if row["mean"] is None and row["quantity"] == "MLP output"}
    assert scarce
    figure = pyarrow.csv.read_csv(run / "figures" / "tracing.csv", convert_options=NULLS).to_pylist()
    assert not scarce & {row["place"] for row in figure}
    assert all(row["mean"] is not None for row in figure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--facts", "embeded"], "unknown set of facts 'embeded'; did you mean 'embedded'"),
        (["--cases", "3"], "n_cases must be a whole number from 4"),
        (["--published-cases"], "no case ids were published for"),
        (["--foils", "prior"], "foils='prior' goes with corruption='noise'"),
        (["--chat"], "this model has no chat template"),
        (["--model", "tiny-olmoe-fact"], "did you mean 'tiny-olmoe-facts'"),
    ],
)
def test_bad_input_is_answered(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *options, "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
