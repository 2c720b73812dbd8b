"""From an effect table to cells, files and page: planted effects found, slow loops matched, bytes repeated, faults named."""

import errno
import hashlib
import html.parser
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.cell_text import terminal_table
from hooked_moe.cells import Cell, audit_cells, cells_table
from hooked_moe.criteria import expert_criteria
from hooked_moe.drawing import Drawing
from hooked_moe.report import write_report
from hooked_moe.summaries import LAYER_COLUMNS
from tests.synthetic_effects import synthetic_effects, synthetic_run

N_EXPERTS = 16
EFFECTS = synthetic_effects()
CRITERIA_TABLE = expert_criteria(EFFECTS, n_experts=N_EXPERTS)


def key(cell: Cell) -> tuple[str, str, int]:
    return cell.population, cell.ranking, cell.layer


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return audit_cells(EFFECTS, CRITERIA_TABLE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An analysed and reported run; tests that change files copy it."""
    directory = synthetic_run(tmp_path_factory.mktemp("runs") / "made-up")
    analyse_run(directory, n_experts=N_EXPERTS)
    write_report(directory)
    return directory


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Pages without the seconds that painting takes, for tests of their words."""
    blank = {"svg": b"<svg/>", "png": b""}
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, narrow=False: {kind: blank[kind] for kind in kinds})


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "file.txt"
    tables.write_text_atomic("old", target)

    def interrupted() -> None:
        with tables.atomic_path(target) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_reader_keeps_the_old_file_whole_while_the_new_one_takes_its_name(tmp_path):
    tables.write_text_atomic("old", tmp_path / "file.txt")
    with open(tmp_path / "file.txt") as reader:
        tables.write_text_atomic("new", tmp_path / "file.txt")
        assert reader.read() == "old"
    assert (tmp_path / "file.txt").read_text() == "new"


def test_a_killed_writer_leaves_the_final_name_alone(tmp_path):
    """A child process dies by SIGKILL inside the block: nothing under the final name, one temporary to sweep."""
    child = os.fork()
    if child == 0:
        with tables.atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert not (tmp_path / "file.txt").exists()
    assert tables.remove_temporaries(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_a_full_disk_and_missing_directories_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"the directory .*nowhere does not exist"):
        tables.write_text_atomic("x", tmp_path / "nowhere" / "file.txt")
    (tmp_path / "plain").write_text("")
    with pytest.raises(OSError, match=r"plain is not a directory"):
        tables.write_text_atomic("x", tmp_path / "plain" / "file.txt")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*file.txt: No space left on device; free some space") as caught:
        tables.write_text_atomic("x", tmp_path / "file.txt")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["plain"]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    tables.write_json_atomic({"b": 1, "a": [True, None]}, tmp_path / "x.json")
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON"):
        tables.write_json_atomic({"a": float("nan")}, tmp_path / "y.json")
    assert not (tmp_path / "y.json").exists()


def test_every_column_of_every_schema_has_a_meaning_and_a_unit(run):
    cell_columns = cells_table([]).schema
    experts = pq.read_schema(run / "experts.parquet")
    for schema in (tables.EFFECTS, tables.EFFECTS_SEQUENCE, tables.TOKENS, tables.DOCUMENTS, cell_columns, experts):
        for column in schema:
            assert set(column.metadata) == {b"meaning", b"unit"}, column.name
            assert all(column.metadata.values()), column.name
    assert pq.read_schema(run / "effects.parquet").field("gap_norm").metadata[b"meaning"].startswith(b"g ||E")
    assert tables.read_csv(run / "layers.csv").column_names == list(LAYER_COLUMNS)


# --- the page --------------------------------------------------------------------------------------------------------

FIGURES = ("effect_size", "removal_effect", "slots", "experts")
VOID = {"meta", "img", "source", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and gathers text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_is_whole_and_needs_no_network(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert len(page.addresses) == 2 * len(FIGURES)  # wide and narrow
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "http" not in (run / "report.html").read_text(encoding="utf-8").split("<body>")[0]
    for name in FIGURES:
        for kind in ("svg", "png", "csv"):
            assert (run / "figures" / f"{name}.{kind}").stat().st_size > 300
    expected = ["made-up-moe", "11,232 removals", "0 of 12", "1 of 3", "made-up <corpus>", "2.1e-06", "routed sum equals block"]
    expected += ["high matters more", "address", "Absent: this run has no effects_sequence.parquet"]
    for text in (*expected, *EFFECTS.column_names, *cells_table([]).column_names):
        assert text in page.text, text


def test_a_rerun_gives_the_same_bytes(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "elsewhere")
    analyse_run(again, n_experts=N_EXPERTS)
    write_report(again)
    assert digests(again) == digests(run)
    assert not list(again.rglob(".*"))


@pytest.mark.usefixtures("unpainted")
def test_the_page_says_what_is_absent(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "effects.parquet", bare)
    analyse_run(bare, n_experts=N_EXPERTS)
    write_report(bare)
    text = Page((bare / "report.html").read_text(encoding="utf-8")).text
    for absent in ("no documents.parquet", "no manifest.json", "records no verification", "records no noise floor"):
        assert f"Absent: this run has {absent}" in text or f"Absent: the manifest {absent}" in text
    assert "unnamed model" in text


def test_failed_checks_and_refused_cells_are_shown_as_such(tmp_path):
    run = synthetic_run(tmp_path / "few", n_documents=8)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["verification"][0] |= {"passed": False, "value": 0.5}
    tables.write_json_atomic(manifest, run / "manifest.json")
    printed = terminal_table(analyse_run(run, n_experts=N_EXPERTS))
    write_report(run)
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "FAILED" in text
    assert "8 documents; tests over documents at 0.05/12 need at least 10" in text
    assert "every cell was refused (8 documents" in text
    assert printed.count("refused, see cells.csv") == 15


@pytest.mark.usefixtures("unpainted")
def test_both_scopes_are_audited_and_compared_where_both_were_measured(run, tmp_path):
    both = shutil.copytree(run, tmp_path / "both")
    sequence = EFFECTS.select(tables.EFFECTS_SEQUENCE.names).cast(tables.EFFECTS_SEQUENCE)
    tables.write_parquet_atomic(sequence, both / "effects_sequence.parquet")
    cells = analyse_run(both, n_experts=N_EXPERTS)
    assert [cell.scope for cell in cells] == ["position"] * 30 + ["sequence"] * 30
    for one, other in zip(cells[:30], cells[30:], strict=True):
        np.testing.assert_equal(asdict(one) | {"scope": ""}, asdict(other) | {"scope": ""})
    write_report(both)
    assert "removed in the whole sequence" in Page((both / "report.html").read_text(encoding="utf-8")).text


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"effects\.parquet does not exist; the measurement writes it"):
        analyse_run(tmp_path, n_experts=N_EXPERTS)
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet")
    with pytest.raises(FileNotFoundError, match=r"experts\.parquet does not exist; analyse_run writes it"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="expert 14, but the model has 8 experts"):
        analyse_run(tmp_path, n_experts=8)
