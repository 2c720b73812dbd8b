"""From an effect table to cells, files and page: planted effects found, slow loops matched, bytes repeated, faults named."""

import hashlib
import html.parser
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.cell_text import terminal_table
from hooked_moe.cells import Cell, audit_cells, cells_table
from hooked_moe.criteria import expert_criteria
from hooked_moe.drawing import Drawing
from hooked_moe.report import write_report
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
    assert [cell.scope for cell in cells] == ["position"] * 120 + ["sequence"] * 120
    for one, other in zip(cells[:120], cells[120:], strict=True):
        np.testing.assert_equal(asdict(one) | {"scope": ""}, asdict(other) | {"scope": ""})
    write_report(both)
    assert "removed in the whole sequence" in Page((both / "report.html").read_text(encoding="utf-8")).text


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"effects\.parquet does not exist; the measurement writes it"):
        analyse_run(tmp_path, n_experts=N_EXPERTS)
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet")
    with pytest.raises(FileNotFoundError, match=r"experts\.parquet does not exist; analyse_run writes it"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"expert 14 outside 0\.\.7, those of the model"):
        analyse_run(tmp_path, n_experts=8)
