"""`hooked-moe study`: its studies end to end, on a small model and a neighbour of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import checkpoints, factor_study
from hooked_moe import HookedMoE
from hooked_moe.analysis.responses import Response
from hooked_moe.checks import UnknownNameError
from hooked_moe.cli.study import STUDIES, main
from hooked_moe.cli.study_checkpoints import OLMOE_STEPS, listed
from hooked_moe.corpus import load_facts
from hooked_moe.loading.revisions import check_revisions
from hooked_moe.measurement.fact_losses import FactLosses
from hooked_moe.tables import CHECKPOINTS, COALITION_SHARES, GRAFTS, read_csv
from tests.support.hub_server import HubServer, files_of, hub_for

SMALL = ["--documents", "14", "--tokens", "12"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that read tiny-olmoe's tokens."""
    torch.manual_seed(1)
    whole = HookedMoE.from_pretrained("tiny-olmoe")
    sizes = {"n_layers": 2, "d_model": 32, "d_head": 8, "num_experts": 8, "experts_per_token": 2, "d_expert": 16}
    model = HookedMoE(whole.cfg.replace(**sizes, initializer_range=0.3), whole.tokenizer)
    directory = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def neighbour(base: Path) -> Path:
    """The same with weaker experts in the last layer, and a training step."""
    model = HookedMoE.from_pretrained(base)
    with torch.no_grad():
        model.blocks[1].mlp.experts.W_out.mul_(0.5)
    directory = base.with_name("step-300")
    model.save_pretrained(directory)
    (directory / "recipe.json").write_text('{"step": 300}')
    return directory


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_shows_its_examples(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([study, "--help"])
    assert stopped.value.code == 0
    assert f"hooked-moe study {study}" in capsys.readouterr().out
    assert f"\n    hooked-moe study {study}" in (STUDIES[study].__doc__ or "")


def test_scripts_are_the_studies() -> None:
    for script in (checkpoints, factor_study):
        assert script.__doc__
        assert callable(script.main)


# --- grafts -----------------------------------------------------------------------------------------------------------------


def test_grafts_on_text_say_where_the_difference_is(base: Path, neighbour: Path, tmp_path: Path) -> None:
    options = [
        "--a",
        str(base),
        "--b",
        str(neighbour),
        "--readout",
        "loss",
        *SMALL,
        "--sweeps",
        "single",
        "part",
        "ends",
        "--out",
        str(tmp_path),
    ]
    assert main(["grafts", *options, "--no-shapley", "--match-experts", "--floor", str(base)]) == 0
    rows = read_csv(tmp_path / "grafts.csv", GRAFTS).to_pylist()
    share = {(row["layers"], row["parts"], row["direction"]): row["share"] for row in rows}
    for direction in ("a<-b", "b<-a"):
        assert share["1", "blocks", direction] == pytest.approx(1, abs=1e-3)
        assert share["all", "experts", direction] == pytest.approx(1, abs=1e-3)
        assert share["0", "blocks", direction] == pytest.approx(0, abs=1e-3)
        assert share["all", "router", direction] == pytest.approx(0, abs=1e-3)
    null = read_csv(tmp_path / "reinitialised.csv", GRAFTS).to_pylist()
    assert {row["direction"] for row in null} == {"a<-other", "b<-other"}
    assert next(row["share"] for row in null if row["layers"] == "0") != 0
    floor = read_csv(tmp_path / "seeds.csv", GRAFTS).to_pylist()
    assert all(row["share"] == pytest.approx(0, abs=1e-6) for row in floor if row["direction"] == "a<-other")  # a itself
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "experts carries most of the difference" in page
    assert "Routers alone carry" in page
    assert json.loads((tmp_path / "study.json").read_text())["ends"]["a"].startswith("14 documents: loss ")
    assert (tmp_path / "figures" / "graft_parts.csv").is_file()
    assert f"From another seed ({base}, experts matched to those of a)" in page
    beside = read_csv(tmp_path / "figures" / "graft_nulls.csv").to_pylist()
    assert {(row["sweep"], row["host"], row["source"]) for row in beside} == {
        ("single", host, source) for host in "ab" for source in ("training", "new", "seed")
    }
    assert main(["grafts", *options, "--no-shapley"]) == 0
    assert not (tmp_path / "seeds.csv").exists()
    assert "From another seed" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_grafts_on_facts_have_exact_shares_and_stream(base: Path, neighbour: Path, tmp_path: Path) -> None:
    options = ["--a", str(base), "--b", str(neighbour), "--n-facts", "5", "--sweeps", "ends"]
    assert main(["grafts", *options, "--out", str(tmp_path / "a")]) == 0
    for players in ("layers", "parts"):
        shares = read_csv(tmp_path / "a" / f"shapley_{players}.csv", COALITION_SHARES)
        assert sum(shares["shapley"].to_pylist()) == pytest.approx(1, abs=1e-6)
    assert main(["grafts", *options, "--no-shapley", "--stream", "--out", str(tmp_path / "b")]) == 0
    whole, streamed = (read_csv(tmp_path / name / "grafts.csv", GRAFTS)["value"].to_numpy() for name in ("a", "b"))
    np.testing.assert_allclose(whole, streamed, atol=1e-5)
    assert main(["grafts", *options, "--stream", "--match-experts", "--out", str(tmp_path / "b")]) == 1


@torch.no_grad()
def test_fact_losses_are_those_of_the_answers_first_token() -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    assert model.tokenizer is not None
    records = load_facts("embedded")[:200:20]
    facts = FactLosses(model.tokenizer, records)
    total, count = facts.losses(model)
    by_subject = dict.fromkeys(facts.subjects, 0.0)
    right = 0
    for record in records:
        prompt = model.to_tokens(record.text)
        answer = model.to_tokens(f"{record.text} {record.true}")[0, prompt.shape[1]]
        log_p = model(prompt)[0, -1].double().log_softmax(-1)
        by_subject[record.subject] -= float(log_p[answer])
        others = {
            model.to_tokens(f"{r.text} {r.true}")[0, model.to_tokens(r.text).shape[1]].item()
            for r in records
            if r.relation == record.relation
        }
        right += max(others, key=lambda token: float(log_p[token])) == int(answer)
    np.testing.assert_allclose(total, list(by_subject.values()), atol=1e-4)
    assert count.sum() == len(records)
    assert facts.accuracy(model) == pytest.approx(right / len(records))


# --- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_checkpoints_are_audited_once_each_and_drawn_by_step(
    base: Path, neighbour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["checkpoints", *SMALL, "--layers", "all", "--out", str(tmp_path), "--models"]
    assert main([*options, str(neighbour)]) == 0
    both = [*options, str(neighbour), str(base), "--steps", "300", "0"]
    assert main(both) == 0
    assert f"{neighbour}: audited before" in capsys.readouterr().out
    rows = read_csv(tmp_path / "checkpoints.csv", CHECKPOINTS).to_pylist()
    assert list(dict.fromkeys(row["step"] for row in rows)) == [0, 300]
    size = {row["step"]: row["value"] for row in rows if row["name"] == "mean_kl" and row["layer"] == "1"}
    assert size[300] < 0.5 * size[0]  # the neighbour's last experts do half
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 checkpoints, from step 0 to 300." in page
    assert (tmp_path / "figures" / "checkpoints.csv").is_file()
    assert main([*both[:-3], "tiny-qwen-moe", "--steps", "300", "0"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --models DIRECTORY"),
        (["--models", "tiny-olmoe"], "tiny-olmoe does not say its training step: give --steps"),
        (["--models", "tiny-olmoe", "--steps", "1", "2"], "--steps gives 2 numbers for 1 checkpoints"),
        (["--models", "tiny-olmoe", "--delete-after"], "directories are yours, and stay"),
        (["--model", "tiny-olmoe", "--revisions", "step1"], "--revisions are of a model on the hub"),
    ],
)
def test_lists_of_checkpoints_that_make_no_sense(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", *options, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_other_settings_do_not_go_into_one_curve(
    base: Path, neighbour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [Response(layer, "mean_kl", 0.5) for layer in ("all", "1")]
    monkeypatch.setattr("hooked_moe.cli.study_checkpoints.reduced_audit", lambda *arguments: tmp_path)
    monkeypatch.setattr("hooked_moe.cli.study_checkpoints.audit_responses", lambda directory: measured)
    options = ["checkpoints", *SMALL, "--layers", "1", "--out", str(tmp_path / "out"), "--steps", "0", "--models"]
    assert main([*options, str(base)]) == 0
    assert main([*options, str(base)]) == 0
    assert main(["checkpoints", *SMALL, "--layers", "all", *options[len(SMALL) + 3 :], str(neighbour)]) == 1
    assert "checkpoints.csv is of other settings (--layers 1): give these again, or another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--n-facts", "0"], "--n-facts 0: give 1 or more"), (["--floor", "x", "--sweeps", "ends"], "--floor goes with the sweeps")],
)
def test_options_of_grafts_that_would_do_nothing(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grafts", *options]) == 1
    assert said in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for(tmp_path / "cache", monkeypatch) as server:
        yield server


def test_revisions_are_checked_first_and_deleted_after(
    hub: HubServer, base: Path, neighbour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [Response(layer, "mean_kl", 0.5) for layer in ("all", "1")]
    monkeypatch.setattr("hooked_moe.cli.study_checkpoints.reduced_audit", lambda *arguments: tmp_path)
    monkeypatch.setattr("hooked_moe.cli.study_checkpoints.audit_responses", lambda directory: measured)
    hub.publish("org/run", files_of(base), "step100", "main")
    hub.publish("org/run", files_of(neighbour), "step200-tokens1B")
    out = ["--out", str(tmp_path / "out"), *SMALL, "--layers", "1", "--delete-after", "--model", "org/run", "--revisions"]
    assert main(["checkpoints", *out, "step100", "step300"]) == 1
    assert hub.fetched() == []
    with pytest.raises(UnknownNameError, match="unknown revision of org/run 'step300'; did you mean 'step100'"):
        check_revisions("org/run", ["step300"])
    assert main(["checkpoints", *out, "step100"]) == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    rows = read_csv(tmp_path / "out" / "checkpoints.csv", CHECKPOINTS).to_pylist()
    assert {(row["checkpoint"], row["step"]) for row in rows} == {("step100", 100)}


def test_the_ten_revisions_of_olmoe_are_named_as_its_branches_are() -> None:
    assert len(OLMOE_STEPS) == 10
    for step, tokens in OLMOE_STEPS.items():
        assert tokens == step * 4_194_304 // 10**9
    names = argparse.Namespace(
        models=[f"step{s}-tokens{t}B" for s, t in OLMOE_STEPS.items()], model=None, revisions=None, steps=None
    )
    names.delete_after = False
    assert [checkpoint.step for checkpoint in listed(names)] == sorted(OLMOE_STEPS)
