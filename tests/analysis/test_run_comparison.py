"""Two runs side by side: the sums are those of savings.csv, planted differences are found, and what cannot be paired says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.analysis.compared_run import read_compared_run, what_differs
from hooked_moe.analysis.document_savings import document_savings
from hooked_moe.analysis.run_comparison import RunComparison, compare_runs, pair_documents
from hooked_moe.cli import compare_runs as command
from hooked_moe.report.figures.drawing import Drawing
from tests.support.synthetic_effects import synthetic_run

SHAPE = {"name": "made-up", "config": {"n_layers": 3, "num_experts": 16, "d_vocab": 100}}


def made(directory: Path, seed: int = 0, **options: object) -> Path:
    """An analysed run of a made-up corpus."""
    run = synthetic_run(directory, seed=seed, **options)
    tables.write_checked_json(
        {"model": SHAPE, "corpus": {"name": "text", "sha256": "same"}, "measurement": {}}, run / "manifest.json"
    )
    analyse_run(run, n_experts=16, n_positions=50)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents; every effect of the expert that the routing weight ranks lowest is 0.05 nats more."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("runs") / "second")
    effects = tables.read_parquet(copy / "effects.parquet")
    delta, slot = effects["delta_loss"].to_numpy(), effects["slot"].to_numpy()
    raised = pa.array((delta + 0.05 * (slot == slot.max())).astype(np.float32))
    index = effects.schema.get_field_index("delta_loss")
    tables.write_parquet_atomic(effects.set_column(index, effects.schema.field(index), raised), copy / "effects.parquet")
    analyse_run(copy, n_experts=16, n_positions=50)
    return copy


@pytest.fixture(scope="module")
def found(run: Path, other: Path) -> RunComparison:
    return compare_runs(read_compared_run(run), read_compared_run(other))


def test_sums_by_document_are_those_of_the_table_of_savings(run: Path) -> None:
    compared = read_compared_run(run)
    expected = {(row["effect"], row["ranking"]): row for row in compared.savings.to_pylist() if row["layer"] == "all"}
    for effect, sums in document_savings(run, compared.layers, compared.layers, compared.seed).items():
        for number, name in enumerate(sums.criteria):
            n, random, lowest = (x[:, number].sum() for x in (sums.n, sums.random, sums.lowest))
            row = expected[effect, name]
            assert n == row["n_positions"]
            if n:
                assert random / n == pytest.approx(row["random_cost"], rel=1e-9)
                assert lowest / n == pytest.approx(row["lowest_cost"], rel=1e-9)


def test_shares_and_intervals_of_either_run_are_those_of_its_own_table(found: RunComparison) -> None:
    for side, compared in zip(("first", "second"), found.runs, strict=True):
        expected = {(row["effect"], row["ranking"]): row for row in compared.savings.to_pylist() if row["layer"] == "all"}
        for row in found.savings:
            own = expected[row["effect"], row["quantity"]]
            for end in ("", "_low", "_high"):
                assert row[f"{side}{end}"] == pytest.approx(own[f"saving_share{end}"], rel=1e-6, nan_ok=True)
            assert row[f"outcome_{side}"] == own["outcome"]


def test_a_planted_difference_in_cost_is_found_paired(found: RunComparison) -> None:
    assert found.pairing.documents is not None
    assert "Paired over 24 documents" in found.pairing.note
    cost = next(row for row in found.costs if row["effect"] == "delta_loss")
    assert cost["difference"] == pytest.approx(-0.05 / 4, rel=1e-3)  # one of four slots
    assert cost["verdict"] == "second more"
    kl = [row for row in found.savings if row["effect"] == "kl"]
    assert kl
    assert {row["verdict"] for row in kl} == {"the same"}


def test_a_run_against_a_copy_of_itself_is_the_same_and_ranks_correlate_fully(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    same = compare_runs(read_compared_run(run), read_compared_run(copy))
    assert {row["verdict"] for row in same.savings} == {"the same"}
    assert all(row["mean"] == pytest.approx(1) for row in same.ranks)
    assert same.differing == []


def test_documents_of_another_text_are_not_paired(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    manifest = tables.read_checked_json(copy / "manifest.json")
    manifest["corpus"]["sha256"] = "another"
    tables.write_checked_json(manifest, copy / "manifest.json")
    one, other = read_compared_run(run), read_compared_run(copy)
    tokens_agree = pair_documents(one, other)
    assert "whose tokens agree" in tokens_agree.note
    tokens = tables.read_parquet(copy / "tokens.parquet")
    index = tokens.schema.get_field_index("token")
    shifted = pa.array(tokens["token"].to_numpy() + 1)
    tables.write_parquet_atomic(tokens.set_column(index, tokens.schema.field(index), shifted), copy / "tokens.parquet")
    assert pair_documents(one, other).documents is None
    assert "0 documents are the same in both runs, and pairing needs 10" in pair_documents(one, other).note
    assert ("corpus.sha256", "same", "another") in what_differs(one, other)


def test_models_of_another_shape_have_no_counterparts(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    manifest = tables.read_checked_json(copy / "manifest.json")
    manifest["model"]["config"]["n_layers"] = 12
    tables.write_checked_json(manifest, copy / "manifest.json")
    compared = compare_runs(read_compared_run(run), read_compared_run(copy))
    assert compared.ranks == []
    assert "differ in shape (3 layers of 16 experts against 12 layers of 16 experts)" in compared.notes[0]
    assert compared.pairing.documents is not None  # the text is the same


# --- what cannot be compared, and the command --------------------------------------------------------------------------------


def test_what_cannot_be_compared_says_what_to_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released, unfinished, lacking, budgeted = (tmp_path / name for name in ("released", "unfinished", "lacking", "budgeted"))
    for directory in (released, unfinished, lacking, budgeted):
        directory.mkdir()
    for directory, more in ((released, {"protocol": {}}), (lacking, {}), (budgeted, {"budget": {"share": 0.1}})):
        tables.write_checked_json({"model": SHAPE} | more, directory / "manifest.json")
    for second, words in (
        (tmp_path / "nothing", "is no directory"),
        (unfinished, "it has no manifest.json"),
        (released, "a run of --protocol as_released"),
        (lacking, "lacks effects.parquet, documents.parquet, experts.parquet, savings.csv"),
        (budgeted, "a budgeted audit, which made a sample of the removals"),
        (run, "are one run; give two"),
    ):
        assert command.main([str(run), str(second)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


def test_a_stale_analysis_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    tables.write_csv_atomic(tables.read_csv(copy / "savings.csv").slice(0, 5), copy / "savings.csv")
    with pytest.raises(ValueError, match=r"savings\.csv is not of this run's measurement"):
        read_compared_run(copy)


def test_the_command_prints_a_table_and_writes_a_page(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    assert command.main([str(run), str(other), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Paired over 24 documents" in printed
    assert max(map(len, printed.splitlines())) <= 130
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Two audits: " in page
    assert "Do the criteria rank the experts alike?" in page
    assert "nan" not in page.split("</style>")[1]
    table = tables.read_csv(tmp_path / "comparison.csv")
    assert {"random cost", "reap"} <= {*table["quantity"].to_pylist()}
    before = (tmp_path / "comparison.html").read_bytes()
    assert command.main([str(run), str(other), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "comparison.html").read_bytes() == before
