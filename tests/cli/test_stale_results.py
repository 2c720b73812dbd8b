"""A finished run opened again: what is stale, damaged or lost is made again or named, whatever clocks say."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hooked_moe import HookedMoE
from hooked_moe.cli import compare, measured_run
from hooked_moe.cli.main import main
from hooked_moe.report import write_report
from hooked_moe.report.figures.drawing import Drawing
from hooked_moe.tables import ledger, read_checked_json, read_csv, write_checked_json
from tests.support.damage import cut_short, delete, flip_bit, overwrite
from tests.support.kills import contents
from tests.support.number_text import number_reader, write_corpus

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTHS = (14, 16, 11)
PRUNE = ("--corpus", "many.jsonl", "--shares", "0.34", "--criteria", "reap", "--random", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def workplace(home: Path, make_model: Callable[..., HookedMoE], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a corpus; figures are drawn as empty pictures."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    if not (home / "model").exists():
        number_reader(make_model, n_layers=1, n_ctx=16, d_head=8, model_type="olmoe").save_pretrained(home / "model")
        write_corpus(home / "corpus.jsonl", LENGTHS)
        write_corpus(home / "many.jsonl", (14, 16, 15, 9, 20, 16, 12, 20, 16, 16))
    return home


def run(command: str, *more: str, results: Path) -> Path:
    """The directory of the run of a command that ends well."""
    given = ["--model", "model", "--corpus", "corpus.jsonl", "--tokens", "all", "--run", "run", "--results", str(results)]
    assert main([command, *given, *more]) == 0
    return results / "model" / "run"


@pytest.fixture
def finished(workplace: Path, home: Path, tmp_path: Path) -> Path:
    """A copy of a finished audit in both scopes."""
    if not (home / "results").exists():
        run("audit", "--scope", "both", results=home / "results")
    shutil.copytree(home / "results", tmp_path / "results")
    return tmp_path / "results" / "model" / "run"


def audited_again(finished: Path, *more: str) -> dict[str, bytes]:
    """What the directory has after the audit; files that were set aside are taken away."""
    run("audit", "--scope", "both", *more, results=finished.parents[1])
    for path in finished.rglob("*.damaged"):
        path.unlink()
    return contents(finished)


@pytest.mark.parametrize("ahead", [10**9])
def test_more_positions_replace_what_fewer_gave_whatever_the_clock_says(workplace: Path, ahead: float, tmp_path: Path) -> None:
    """All files of the first measurement seem to be of long ago, or of days to come."""
    first = run("audit", "--positions", "20", results=tmp_path / "one")
    for path in first.rglob("*"):
        os.utime(path, (path.stat().st_mtime + ahead,) * 2)
    once = contents(run("audit", results=tmp_path / "once"))
    assert contents(run("audit", results=tmp_path / "one")) == once
    assert read_csv(first / "positions.csv").num_rows == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cells.csv", flip_bit),
        ("experts.parquet", cut_short),
        ("analysis.json", cut_short),
        ("report.html", delete),
        ("figures/slots.csv", overwrite),
    ],
)
def test_a_derived_file_that_is_damaged_or_lost_is_made_again(finished: Path, name: str, damage: Any) -> None:
    before = contents(finished)
    damage(finished / name, random.Random(0))
    assert audited_again(finished) == before


@pytest.mark.parametrize("name", ["routing", "documents", "effects_sequence"])
def test_a_measured_table_that_is_lost_is_measured_again(finished: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    (finished / f"{name}.parquet").unlink()
    assert audited_again(finished) == before
    assert f"{name}.parquet is missing; it is made again" in capsys.readouterr().out


def test_a_kill_between_the_tables_and_the_report_leaves_no_old_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers change with the size of the sample; the report of the larger one stands beside those of the smaller."""
    before = contents(finished)
    with monkeypatch.context() as patch:
        patch.setattr(measured_run, "SAMPLE_SIZE", 20)
        patch.setattr(measured_run, "write_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["audit", *settings(finished)]) == 130
    changed = contents(finished)
    assert changed["cells.csv"] != before["cells.csv"]
    assert changed["report.html"] == before["report.html"]
    with monkeypatch.context() as patch:
        patch.setattr(measured_run, "SAMPLE_SIZE", 20)
        assert audited_again(finished)["report.html"] != before["report.html"]
    assert audited_again(finished) == before


def settings(finished: Path) -> list[str]:
    given = ["--model", "model", "--corpus", "corpus.jsonl", "--tokens", "all", "--run", "run", "--scope", "both"]
    return [*given, "--results", str(finished.parents[1])]


def test_derived_tables_of_another_version_are_made_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "__version__", "99")
    audited_again(finished)
    assert "analysed again: made by hooked_moe" in capsys.readouterr().out
    assert json.loads((finished / "analysis.json").read_text())["derivations"]["analysis"]["version"] == "99"


def test_a_manifest_of_another_model_is_refused(
    finished: Path, make_model: Callable[..., HookedMoE], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_checked_json(finished / "manifest.json")
    manifest["model"]["weights_sha256"] = "0" * 64
    write_checked_json(manifest, finished / "manifest.json")
    assert main(["audit", *settings(finished)]) == 1
    assert "manifest.json is of another model than this run: remove it" in capsys.readouterr().err


def test_tables_of_other_commands_that_went_stale_are_left_out_and_named(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pruning and a control of 40 positions, and then a measurement of all."""
    many = ("--corpus", "many.jsonl")
    directory = run("audit", "--positions", "40", *many, results=tmp_path)
    run("control", "--positions", "40", *many, results=tmp_path)
    run("prune", *PRUNE, results=tmp_path)
    assert "made of another effects.parquet" not in (directory / "report.html").read_text()
    run("audit", *many, results=tmp_path)
    page = (directory / "report.html").read_text()
    assert "made of another effects.parquet" in page
    assert "`hooked-moe prune` makes it again" in page
    capsys.readouterr()
    assert compare.main([str(directory), "--brief"]) == 0
    said = capsys.readouterr().out
    assert "without control.csv: made of another" in said
    assert "`hooked-moe control` makes it again" in said
    run("control", *many, results=tmp_path)
    run("prune", *PRUNE, results=tmp_path)
    assert "made of another effects.parquet" not in (directory / "report.html").read_text()
    assert compare.main([str(directory), "--brief"]) == 0
    assert "without" not in capsys.readouterr().out


def test_what_analysis_json_says_is_not_believed_when_it_was_changed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    values = json.loads((finished / "analysis.json").read_text())
    values["not_measured"]["progressive.csv"] = "it was not worth it"
    (finished / "analysis.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match=r"has none of the derived tables .*savings\.csv: analysis\.json is damaged"):
        write_report(finished)
    assert audited_again(finished) == before
    assert "analysed again: analysis.json is damaged" in capsys.readouterr().out


def test_a_table_of_unknown_origin_is_not_reported(finished: Path) -> None:
    shutil.copy(finished / "cells.csv", finished / "pruning.csv")
    write_report(finished)
    assert "analysis.json does not say of what it was made" in (finished / "report.html").read_text()


def test_a_damaged_pruning_table_begins_again(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run("prune", *PRUNE, results=tmp_path)
    before = contents(directory)
    overwrite(directory / "pruning.csv", random.Random(0))
    run("prune", *PRUNE, results=tmp_path)
    assert "pruning.csv is damaged, and with it is lost what earlier commands pruned by" in capsys.readouterr().out
    assert contents(directory) == before
