"""`hooked_moe.audit` is the command, in Python; and what either says to a corpus of few documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import hooked_moe
from hooked_moe import HookedMoE, measurement
from hooked_moe.cli import audit as command
from hooked_moe.executors import Threads
from hooked_moe.measurement.budget import Budget
from hooked_moe.report.figures.drawing import Drawing
from tests.support.kills import contents
from tests.support.number_text import number_reader, write_corpus

pytestmark = pytest.mark.usefixtures("unchecked")
Make = Callable[..., HookedMoE]


@pytest.fixture
def workplace(tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a corpus in the working directory; figures are drawn as empty pictures."""
    number_reader(make_model, n_layers=2, n_ctx=16).save_pretrained(tmp_path / "model")
    write_corpus(tmp_path / "corpus.jsonl", (30, 9, 41, 22))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    return tmp_path


def test_it_does_what_the_command_does_to_the_byte(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "model", "--corpus", "corpus.jsonl", "--layers", "1", "--positions", "40", "--documents", "3"]
    assert command.main([*options, "--tokens", "20", "--results", "a"]) == 0
    printed = capsys.readouterr().out
    model = HookedMoE.from_pretrained("model")
    said: list[str] = []
    found = hooked_moe.audit(
        model, "corpus.jsonl", layers=[1], positions=40, documents=3, tokens=20, results="b", log=said.append
    )
    assert capsys.readouterr().out == ""  # what the command says goes to the log
    assert contents(workplace / "a") == contents(workplace / "b")
    assert found.directory.relative_to("b") == next((workplace / "a").glob("*/*")).relative_to(workplace / "a")
    assert found.report.is_file()
    assert str(found) in printed
    assert "\n".join(said).replace("b/model", "a/model") in printed
    assert {"reap", "oracle"} <= {*found.savings["ranking"].to_pylist()}
    assert found.experts.num_rows == 6
    assert found.n_removals == 40 * model.cfg.experts_per_token
    assert found.cells


def test_a_budgeted_audit_elsewhere_is_the_same_too(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement.budget, "FEWEST_REMOVALS", 1)
    options = ["--model", "model", "--corpus", "corpus.jsonl", "--tokens", "40", "--budget", "30%"]
    assert command.main([*options, "--results", "a"]) == 0
    printed = capsys.readouterr().out
    said: list[str] = []

    class Counting(Threads):
        units = 0

        def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
            Counting.units += len(units)
            return super().run(work, units)

    found = hooked_moe.audit("model", "corpus.jsonl", tokens=40, budget="30%", executor=Counting(), results="b", log=said.append)
    assert Counting.units == 2 * 4  # four documents, their estimates and their sample
    assert contents(workplace / "a") == contents(workplace / "b")
    assert str(found) in printed
    assert "\n".join(said).replace("b/model", "a/model") in printed
    assert f"{found.n_removals:,} removals made, " in printed
    made = pq.read_table(found.directory / "sampled_effects.parquet").num_rows
    assert found.n_removals == made
    assert {"reap", "oracle"} <= {*found.savings["ranking"].to_pylist()}
    with pytest.raises(ValueError, match="single positions, of which a budgeted audit has a sample only"):
        _ = found.cells
    for more in (["--positions", "20"], ["--scope", "both"], ["--shard", "1/2"]):
        assert command.main([*options, "--results", "c", *more]) == 1
        assert f"leave out {'--shard' if more[0] == '--shard' else '--positions and --scope'}" in capsys.readouterr().err


def test_its_errors_speak_python(workplace: Path) -> None:
    model = HookedMoE.from_pretrained("model")
    for options, words in (
        ({"context": 17}, "context=17: give a number from 8 to 16"),
        ({"documents": 9}, "documents=9: corpus 'corpus.jsonl' has 4 documents"),
        ({"positions": 2}, "positions=2: give all, or a number from 3"),
        ({"name": "../up"}, "name='../up': give a plain name"),
        ({"scope": "galaxy"}, "scope must be 'position' or 'both'"),
        ({"layers": [5]}, "layers \\[5\\] have no experts"),
        ({"budget": "some"}, "budget 'some': give a share of the removals, as in 1%"),
        ({"budget": 0.5}, "budget must be text, as in '1%' or '10min', or a Budget, not 0.5"),
        ({"budget": "200%"}, "budget '200%': a share of the removals lies above 0% and below 100%"),
        ({"tokens": 0}, "tokens=0: give 2 or more of each document"),
        ({"budget": "1%", "positions": 20}, "a budget draws from .* all documents: leave out positions and scope"),
        ({"budget": Budget(share=0.1), "scope": "both"}, "leave out positions and scope"),
        ({"results": 3}, "results must be a directory"),
    ):
        with pytest.raises(ValueError, match=words.replace("(", "\\(")):
            hooked_moe.audit(model, "corpus.jsonl", **options)  # type: ignore[arg-type]


def test_blank_lines_separate_documents_where_that_is_asked(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [" ".join(str(7 * i + j) for j in range(12)) for i in range(11)]
    (workplace / "text.txt").write_text("\n\n".join([*pieces[:5], "3", *pieces[5:]]) + "\n", encoding="utf-8")
    options = ["--model", "model", "--corpus", "text.txt", "--layers", "1"]
    assert command.main([*options, "--results", "whole", "--positions", "20"]) == 0
    printed = capsys.readouterr().out
    assert "text.txt: 1 documents" in printed
    assert "1 document of 'text.txt': tests over documents need 10 or more and will be refused" in printed
    assert "To read each of the 12 pieces between blank lines as a document: --unit paragraph" in printed
    assert command.main([*options, "--results", "pieces", "--unit", "paragraph"]) == 0
    printed = capsys.readouterr().out
    assert "note: 1 paragraph of one token is left out" in printed
    assert "text.txt: 11 documents" in printed
    assert "will be refused" not in printed


def test_a_corpus_that_has_no_more_documents_says_where_they_could_come_from(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", "model", "--corpus", "corpus.jsonl", "--layers", "1", "--results", "r"]) == 0
    assert "4 documents of 'corpus.jsonl': tests over documents need 10 or more" in (printed := capsys.readouterr().out)
    assert "For more documents: a directory of .txt files, a .jsonl file" in printed
