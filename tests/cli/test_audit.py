"""The audit as a user runs it: what it leaves behind, what it survives, and what it answers to bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from hooked_moe import HookedMoE, measurement, tables
from hooked_moe.cli import audit, measured_run
from hooked_moe.corpus import load_corpus
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.loading.fingerprint import versions, weights_sha256
from hooked_moe.measurement import gate, verification
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.report.figures.drawing import Drawing
from tests.support.kills import contents, forked, signalled_at
from tests.support.number_text import number_reader, number_tokenizer, write_corpus

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (30, 9, 41, 22)
TABLES = (
    "documents.parquet",
    "tokens.parquet",
    "effects.parquet",
    "routing.parquet",
    "expert_weights.parquet",
    "experts.parquet",
    "token_texts.parquet",
    "expert_tokens.parquet",
    "token_shares.parquet",
    "cells.csv",
    "report.html",
    "documents.html",
    "experts.html",
    "manifest.json",
)
Make = Callable[..., HookedMoE]
REPEATED = pytest.mark.usefixtures("unchecked")  # the run whose types the first of these tests checks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def workplace(home: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a corpus; figures are drawn as empty pictures, which saves seconds."""
    if not (home / "model").exists():
        number_reader(make_model, n_layers=2, n_ctx=16).save_pretrained(home / "model")
        make_model(n_layers=1).save_pretrained(home / "speechless")
        write_corpus(home / "corpus.jsonl", LENGTHS)
        (home / "regular-file").write_text("")
    monkeypatch.chdir(home)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    return home


def settings(results: Path, *more: str) -> list[str]:
    """The arguments of most runs here; later ones count."""
    return ["--model", "model", "--corpus", "corpus.jsonl", "--results", str(results), "--run", "run", *more]


def run_audit(results: Path, *more: str) -> Path:
    """The directory of a run that ends well."""
    assert audit.main(settings(results, *more)) == 0
    return results / "model" / "run"


@pytest.fixture
def uninterrupted(workplace: Path, home: Path) -> dict[str, bytes]:
    """Every file of a run in both scopes that nothing disturbed."""
    if not (home / "uninterrupted").exists():
        run_audit(home / "uninterrupted", "--scope", "both")
    return contents(home / "uninterrupted" / "model" / "run")


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_tables_and_nothing_temporary(uninterrupted: dict[str, bytes]) -> None:
    assert {*TABLES, "plan.json", "effects_sequence.parquet", "layers.csv", "positions.csv", "scopes.csv"} <= uninterrupted.keys()
    assert [name for name in uninterrupted if "tmp" in name or "shards" in name] == []


@REPEATED
def test_another_run_elsewhere_gives_the_same_bytes(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    assert contents(run_audit(tmp_path, "--scope", "both")) == uninterrupted


@REPEATED
def test_a_finished_run_reports_again_without_measuring(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run_audit(tmp_path)
    before = contents(directory)
    for room, name in ((gate, "verify"), (measurement.run, "measure_part"), (gate, "noise_floor")):
        monkeypatch.setattr(room, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    assert contents(run_audit(tmp_path)) == before
    for name in ("report.html", "cells.csv", "experts.parquet"):
        (directory / name).unlink()
    (directory / "shards" / "position-0123").mkdir(parents=True)  # as if killed before they were cleared away
    (directory / "shards" / "position-0123" / "000000.tokens.parquet").touch()
    assert contents(run_audit(tmp_path)) == before


def test_the_manifest_says_what_was_measured(workplace: Path, tmp_path: Path) -> None:
    manifest = json.loads((run_audit(tmp_path, "--positions", "20", "--layers", "1") / "manifest.json").read_text())
    model = HookedMoE.from_pretrained(workplace / "model")
    assert manifest["model"]["weights_sha256"] == weights_sha256(model)
    assert (manifest["model"]["name"], manifest["model"]["revision"]) == ("model", None)
    assert manifest["model"]["config"]["num_experts"] == 6
    corpus = load_corpus("corpus.jsonl")
    assert manifest["corpus"] == {
        "name": "corpus.jsonl",
        "sha256": corpus.sha256,
        "documents": 4,
        "tokens": sum(LENGTHS),
        "tokens_sha256": TokenizedCorpus(model, corpus, 16).sha256(),
    }
    assert manifest["measurement"] == {
        "removal": "zero",
        "layers": [1],
        "context": 16,
        "tokens_per_document": 512,
        "bos": None,
    }
    part = manifest["parts"]["position"]
    assert manifest["parts"].keys() == {"position"}
    assert (part["positions"], part["layers"]) == (20, [1])
    assert manifest["versions"] == versions()
    assert [(check["name"], check["passed"]) for check in manifest["verification"]] == [
        (name, True) for name in ("loss", "no stale state", "losses differ", "inactive expert", "effects are exact")
    ]
    assert 0 <= manifest["noise_floor"]["max_abs_nats"] < 1e-5
    assert manifest["noise_floor"]["windows"] == 4


def test_a_sample_is_of_the_positions_that_an_exhaustive_run_analyses(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_run, "SAMPLE_SIZE", 30)
    frozen = []
    for name, positions in (("all", "all"), ("sample", "30"), ("fewer", "10")):
        directory = run_audit(tmp_path / name, "--positions", positions)
        frozen.append({tuple(row.values()) for row in tables.read_csv(directory / "positions.csv").to_pylist()})
    assert frozen[0] == frozen[1]
    assert len(frozen[2]) == 10
    measured = pq.read_table(tmp_path / "fewer" / "model" / "run" / "effects.parquet").to_pandas()
    measured = measured[measured["delta_loss"].notna()]
    assert set(zip(measured["document"], measured["position"], strict=True)) == frozen[2]


@REPEATED
def test_the_same_command_names_its_run_itself(workplace: Path, tmp_path: Path) -> None:
    arguments = ["--model", "model", "--corpus", "corpus.jsonl", "--documents", "2", "--results", str(tmp_path)]
    assert audit.main(arguments) == audit.main(arguments) == 0
    assert audit.main([*arguments, "--tokens", "10"]) == 0
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert len(names) == 2
    assert all(name.startswith("corpus-") for name in names)


def test_a_short_document_is_audited_as_far_as_it_goes_and_that_is_said_first(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "one.jsonl", [9])
    run_audit(tmp_path, "--corpus", str(tmp_path / "one.jsonl"))
    said = capsys.readouterr().out
    assert "tests over documents need 10 or more and will be refused" in said[: said.index("pass")]
    assert "8 sampled positions" in said


def test_a_console_without_the_signs_of_the_table_shows_others(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr(sys, "stdout", console)
        run_audit(tmp_path)
    console.flush()
    assert b"p by permutation over experts" in console.buffer.getvalue()  # type: ignore[attr-defined]


# --- what a run survives ---------------------------------------------------------------------------------------------


def assert_files_are_whole(directory: Path) -> None:
    for path in directory.rglob("*"):
        if not path.is_file() or path.name.endswith(".tmp"):
            continue
        if path.suffix == ".parquet":
            assert pq.read_table(path).num_rows, path
        elif path.suffix == ".csv":
            assert tables.read_csv(path).num_rows, path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").endswith("</html>\n")


@REPEATED
def test_a_run_killed_at_random_times_goes_on_to_the_same_bytes(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """Times, not moments as in test_kill_and_resume.py: two kills, in case something happens between moments after all."""
    directory, chance = tmp_path / "model" / "run", random.Random(0)
    started = time.perf_counter()
    run_audit(tmp_path / "timed", "--scope", "both")
    seconds = time.perf_counter() - started
    for _ in range(2):
        forked(lambda: audit.main(settings(tmp_path, "--scope", "both")), seconds=chance.uniform(0, seconds))
        assert_files_are_whole(tmp_path)
    run_audit(tmp_path, "--scope", "both")
    assert contents(directory) == uninterrupted


@REPEATED
@pytest.mark.parametrize("event", [3, 40])
def test_an_interrupted_run_says_so_and_goes_on(
    uninterrupted: dict[str, bytes], event: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert signalled_at(event, signal.SIGINT, lambda: audit.main(settings(tmp_path, "--scope", "both"))) == 130
    assert capfd.readouterr().err.endswith("\ninterrupted; the same command resumes from here\n")
    assert not list(tmp_path.rglob("*.tmp"))
    assert_files_are_whole(tmp_path)
    run_audit(tmp_path, "--scope", "both")
    assert contents(tmp_path / "model" / "run") == uninterrupted


@REPEATED
def test_a_file_that_cannot_grow_is_named_and_the_run_goes_on_later(
    uninterrupted: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk: whoever writes, Python or Arrow, has its write refused."""

    def confined(limit: int) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return audit.main(settings(tmp_path, "--scope", "both"))

    for limit in (1_000, 4_000, 9_000, 11_000, 20_000):
        assert forked(lambda limit=limit: confined(limit)) == 1
        last = capfd.readouterr().err.splitlines()[-1]
        assert "cannot write" in last, last
        assert str(tmp_path / "model" / "run") in last
        assert not list(tmp_path.rglob("*.tmp"))
        assert_files_are_whole(tmp_path)
    run_audit(tmp_path, "--scope", "both")
    assert contents(tmp_path / "model" / "run") == uninterrupted


# --- what a run refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None) -> Iterator[Callable[..., str]]:
    """Runs the audit, which must exit with 1 and one line; returns the line. Nothing may have been measured."""

    def run(*more: str) -> str:
        assert audit.main(settings(tmp_path, *more)) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    yield run
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--model tiny-olmo", ["unknown model 'tiny-olmo'", "did you mean 'tiny-olmoe'"]),
        ("--model nowhere/to/be/found", ["no directory 'nowhere/to/be/found'", "Accepted are"]),
        ("--model regular-file", ["regular-file is a file", "give the directory"]),
        ("--model .", [". has no config.json"]),
        ("--model speechless", ["no tokenizer", "put its tokenizer.json beside its weights"]),
        ("--revision main", ["revision='main' is for models on the hub"]),
        ("--corpus held-in", ["no corpus 'held-in'", "Did you mean 'held-out'?"]),
        ("--corpus missing.txt", ["no corpus file missing.txt", "Check the path"]),
        ("--corpus model", ["model is a directory without text", "no .txt or .jsonl file"]),
        ("--corpus regular-file", ["regular-file ends in ''", "expected .jsonl"]),
        ("--layers 2", ["layer 2 is out of range", "layers 0 to 1"]),
        ("--layers=-1", ["layer -1 is out of range"]),
        ("--layers first", ["--layers 'first'", "numbers separated by commas"]),
        ("--layers 0,,1", ["--layers '0,,1'", "numbers separated by commas"]),
        ("--positions 99", ["--positions '99'", "from 3 to 98"]),
        ("--positions 2", ["--positions '2'", "from 3 to 98"]),
        ("--positions some", ["--positions 'some'", "give all, or a number"]),
        ("--context 17", ["--context 17", "from 8 to 16, the context of model"]),
        ("--context 7", ["--context 7", "from 8 to 16"]),
        ("--context 0", ["--context 0", "from 8 to 16"]),
        ("--context 16 --tokens 12", ["--context 16", "the longest document", "has 12 tokens", "shorter context"]),
        ("--bos", ["no BOS token"]),
        ("--tokens 7", ["--tokens '7'", "a number of tokens from 8"]),
        ("--tokens few", ["--tokens 'few'", "give all"]),
        ("--documents 5", ["--documents 5", "has 4 documents"]),
        ("--documents 0", ["--documents 0", "has 4 documents: give a number from 1 to 4"]),
        ("--device toaster", ["--device 'toaster' cannot be used here", "give cpu"]),
        ("--device meta", ["--device 'meta' cannot be used here"]),
        ("--run ../elsewhere", ["--run '../elsewhere'", "a plain name"]),
        ("--run ..", ["--run '..'", "a plain name"]),
        ("--results regular-file", ["cannot make the directory regular-file/model/run: Not a directory", "can be written"]),
        ("--results /dev/null/here", ["cannot make the directory /dev/null/here/model/run", "can be written"]),
    ],
)
def test_bad_input_is_named_in_one_line(refused: Callable[..., str], more: str, said: list[str]) -> None:
    line = refused(*more.split())
    assert [text for text in said if text not in line] == [], line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"text": "1 2 3 4 5"}\n{"text": "6 7 8 9 10 11 12"}\n', "has 7 tokens, and verifying the model takes 8"),
        ('{"text": "1 2 3 4 5 6 7 8 9"}\n{"text": "1"}\n', "fewer than two tokens"),
        ("1 2 3 4\n", "line 1 "),
    ],
)
def test_a_corpus_with_too_little_in_it_is_named(refused: Callable[..., str], text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_text(text)
    line = refused("--corpus", str(tmp_path / "small.jsonl"))
    assert said in line
    assert "small.jsonl" in line or "small-2" in line


def test_a_gpu_that_is_not_there_is_named(refused: Callable[..., str]) -> None:
    line = refused("--device", "cuda:99")
    assert "--device 'cuda:99' cannot be used here" in line


def test_options_that_do_not_exist_are_answered_by_the_parser(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--scope", "galaxy"], ["--documents", "many"], ["--modle", "x"]):
        with pytest.raises(SystemExit, match="2"):
            audit.main(arguments)
        assert arguments[1] in capsys.readouterr().err.splitlines()[-1]


def test_a_hub_out_of_reach_is_named(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    line = refused("--corpus", "wikitext-2")
    assert "could not fetch the data set 'Salesforce/wikitext'" in line
    assert "'held-out'" in line
    assert "'olmoe'" in refused("--model", "olmoe") or "allenai/OLMoE" in refused("--model", "olmoe")


def test_a_tokenizer_of_another_model_is_named(refused: Callable[..., str], make_model: Make, tmp_path: Path) -> None:
    model = make_model(n_layers=1, d_vocab=50)
    model.tokenizer = number_tokenizer()
    model.save_pretrained(tmp_path / "mismatched")
    assert "mismatched has ids 0 to 49" in refused("--model", str(tmp_path / "mismatched"))


@REPEATED
@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--layers", "0"], "measurement"),
        (["--documents", "3"], "corpus"),
        (["--dtype", "bfloat16"], "model"),
        (["--documents", "3", "--removal", "reroute"], "corpus and measurement"),
    ],
)
def test_a_run_begun_with_other_settings_is_left_alone(
    workplace: Path, more: list[str], changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_audit(tmp_path)
    before = contents(directory)
    capsys.readouterr()
    assert audit.main(settings(tmp_path, *more)) == 1
    assert f"run was begun with another {changed}: give another name to the run" in capsys.readouterr().err
    assert contents(directory) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}'])
def test_a_plan_that_is_none_of_ours_is_named(refused: Callable[..., str], text: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "run").mkdir(parents=True)
    (tmp_path / "model" / "run" / "plan.json").write_text(text)
    line = refused()
    assert "run" in line
    assert "remove the directory to begin again" in line


def test_a_model_that_fails_a_check_is_not_measured(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = verification.expert_effects

    @pausable
    def off(*inputs: Any, **options: Any) -> Steps[Any]:
        effects = yield from original.steps(*inputs, **options)
        return dataclasses.replace(effects, delta_loss=effects.delta_loss + 1e-3)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "expert_effects", off)
        assert "verification failed (effects are exact); nothing was measured" in refused()
    assert not (tmp_path / "model" / "run" / "shards").exists()
    assert not (tmp_path / "model" / "run" / "manifest.json").exists()


def test_checks_are_made_with_the_removal_and_the_scopes_of_the_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @pausable
    def passed(model: HookedMoE, tokens: Tensor, *rest: Any, products: Any, picked: bool, clean: Any) -> Steps[list[Any]]:
        asked.append((tokens.shape[1], *rest, products, picked))
        yield from ()
        return []

    monkeypatch.setattr(gate, "verify", passed)
    run_audit(tmp_path, "--scope", "both", "--removal", "reroute", "--products", "bfloat16")
    assert asked == [(16, "reroute", ("position",), "bfloat16", False), (16, "reroute", ("sequence",), None, False)]


# --- as commands -----------------------------------------------------------------------------------------------------


def command(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # as if installed
    return subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)


def test_the_script_explains_itself_from_any_directory(tmp_path: Path) -> None:
    done = command(str(ROOT / "experiments" / "audit.py"), "--help", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Remove every routed expert at every token" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_module_runs_as_a_command_and_its_figures_are_the_same_in_every_process(
    home: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"--model": workplace / "model", "--corpus": workplace / "corpus.jsonl", "--results": tmp_path / "a"}
    given = [str(part) for pair in paths.items() for part in pair]
    done = command("-m", "hooked_moe", "audit", *given, directory=ROOT)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout.splitlines()[-1]
    monkeypatch.undo()
    assert audit.main([*given, "--results", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("name", ["2019", "2020-01-01", "true"])
def test_kinds_of_text_may_be_named_like_numbers(workplace: Path, tmp_path: Path, name: str) -> None:
    texts = [" ".join(str((n * k) % 40 + 2) for k in range(1, 12)) for n in range(1, 7)]
    (tmp_path / f"{name}.txt").write_text("\n\u001e\n".join(texts))
    directory = run_audit(tmp_path, "--corpus", str(tmp_path / f"{name}.txt"))
    assert f">{name}<" in (directory / "report.html").read_text()
