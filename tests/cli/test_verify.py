"""The parity report: it passes on sound models of any family, each of its checks can fail, and it says what it did not run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.cli import parity_checks, verify
from hooked_moe.cli.parity_checks import Agreement, Result, Run
from hooked_moe.cli.published_checkpoints import PUBLISHED, Published
from tests.support.hf_models import FAMILIES, random_tokens, save

ROOT = Path(__file__).resolve().parents[2]
FILES = ["census", "tensors", "parameters"]
MODEL = ["golden logits", "loss", "no stale state", "losses differ", "inactive expert", "effects are exact", "noise floor"]
TRANSFORMERS = ["transformers: logits", "transformers: losses", "transformers: routing"]
HALF = ["bfloat16: routing", "bfloat16: losses", "bfloat16: routing of transformers", "float16: routing", "float16: losses"]
Patch = pytest.MonkeyPatch


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A random Qwen2-MoE as transformers saves it: without tokenizer."""
    return save(FAMILIES["qwen2_moe"].tiny(), tmp_path / "model")


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the script in this process; gives the JSON that it writes, with its exit code."""

    def run(*arguments: object) -> dict[str, Any]:
        file = tmp_path / "report.json"
        code = verify.main([*map(str, arguments), "--json", str(file)])
        return json.loads(file.read_text()) | {"code": code}

    return run


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in report["checks"]}


def named(report: dict[str, Any], outcome: str) -> list[str]:
    return [name for name, found in outcomes(report).items() if found == outcome]


QUICK = ("--skip-transformers", "--skip-half", "--tokens", 20)


# --- sound models --------------------------------------------------------------------------------------------------------


def test_the_shipped_model_passes_every_check_there_is_for_it(
    report: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report("--model", "tiny-olmoe", "--tokens", 96)
    printed = capsys.readouterr().out
    assert [check["name"] for check in found["checks"]] == FILES + MODEL + TRANSFORMERS + HALF
    assert found["code"] == 0
    assert named(found, "not run") == ["census", "golden logits"]
    assert named(found, "failed") == []
    assert "96 tokens of 'George Washington, message of 1793-12-03' in the held-out corpus" in printed
    assert printed.splitlines()[-1] == found["summary"] == "16 passed, 0 failed, 2 not run"
    for check in found["checks"]:
        assert f"  {check['outcome']:7}  {check['name']}: " in printed
        assert check["detail"] in printed
    values = {check["name"]: check["value"] for check in found["checks"]}
    assert values["parameters"] == 4_508_800
    assert values["transformers: routing"] == 1
    assert 0 < values["transformers: losses"] < values["float16: losses"] < values["bfloat16: losses"]
    assert values["bfloat16: routing"] < values["float16: routing"] < 1
    assert found["versions"]["transformers"] == importlib.metadata.version("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_every_family_pass(family: str, report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    theirs = FAMILIES[family].tiny(**FAMILIES[family].options["all-at-once"])
    found = report("--model", save(theirs, tmp_path / family, sharded=True), "--tokens", 48)
    assert (named(found, "failed"), found["code"]) == ([], 0)
    assert named(found, "not run") == ["census", "golden logits"]
    assert found["text"] == "48 random token ids, for there is no tokenizer.json"
    assert found["model"] == {"name": family, "revision": None, "model_type": family}
    values = {check["name"]: check["value"] for check in found["checks"]}
    biases = sum(buffer.numel() for name, buffer in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
    assert values["parameters"] == theirs.num_parameters() + biases


def test_one_model_is_held_at_a_time(directory: Path, monkeypatch: Patch) -> None:
    held: list[weakref.ref[torch.nn.Module]] = []
    dtypes: list[torch.dtype] = []

    def alone(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*inputs: Any, **options: Any) -> Any:
            assert [model for model in held if model() is not None] == []
            model = load(*inputs, **options)
            held.append(weakref.ref(model))
            dtypes.append(next(model.parameters()).dtype)
            return model

        return loaded

    for owner in (HookedMoE, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(owner, "from_pretrained", alone(owner.from_pretrained))
    assert verify.main(["--model", str(directory), "--tokens", "20"]) == 0
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]


# --- the files -----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_not_those_of_the_config_end_the_checks(
    directory: Path, report: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    found = report("--model", directory, *QUICK)
    assert outcomes(found) == {"census": "not run", "loading": "failed"}
    assert found["code"] == 1
    assert "1 missing:\n  model.layers.2.mlp.experts.3.up_proj.weight" in capsys.readouterr().out


def test_a_file_that_was_cut_short_fails(directory: Path, report: Callable[..., dict[str, Any]]) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = report("--model", directory, *QUICK)
    assert (named(found, "failed"), found["code"]) == (["loading"], 1)
    assert "may be truncated" in found["checks"][-1]["detail"]


def test_tensors_that_do_not_fill_the_model_are_counted(directory: Path, monkeypatch: Patch) -> None:
    plan_copies = parity_checks.plan_copies

    def without_one(*inputs: Any) -> Any:
        plan = plan_copies(*inputs)
        del plan.copied["model.layers.2.mlp.experts.3.up_proj.weight"]
        return plan

    monkeypatch.setattr(parity_checks, "plan_copies", without_one)
    subject = verify.find(verify.parse_arguments(["--model", str(directory)]))
    results = list(parity_checks.tensors_on_disk(subject.directory, subject.conversion, subject.cfg))
    assert failed(results) == ["tensors", "parameters"]
    assert results[1].threshold - results[1].value == 24 * 64  # type: ignore[operator]


def test_a_copy_of_a_published_checkpoint_is_counted(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors").values()
    sizes = {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "stored_bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
    }
    census = {"parameters": "census: parameters", "stored_bytes": "census: bytes", "tensors": "census: tensors"}
    for wrong, off in ((None, 0), *((key, off) for key in sizes for off in (1, -1))):
        entry = Published("org/model", **{key: size + off * (key == wrong) for key, size in sizes.items()})
        results = list(parity_checks.census(directory, entry))
        assert [result.name for result in results] == list(census.values())
        assert failed(results) == ([census[wrong]] if wrong else [])


def test_another_model_is_not_the_published_one(report: Callable[..., dict[str, Any]]) -> None:
    found = report("--model", "tiny-olmoe", "--expect", "olmoe", *QUICK)
    assert named(found, "failed") == ["census: parameters", "census: bytes", "census: tensors", "golden logits"]


def test_the_published_models_are_those_of_the_short_names(monkeypatch: Patch, tmp_path: Path) -> None:
    """What a hub id or short name is checked against, and nothing for other models of the hub."""
    shipped = verify.locate("tiny-olmoe").directory
    monkeypatch.setattr(verify, "download", lambda hub_id, *_, **__: (shipped, "f" * 40))
    for name, entry in PUBLISHED.items():
        subject = verify.find(verify.parse_arguments(["--model", name]))
        assert (subject.expected, subject.revision, subject.name) == (entry, "f" * 40, entry.hub_id)
    assert verify.find(verify.parse_arguments(["--model", "olmoe-instruct"])).expected is None
    assert verify.find(verify.parse_arguments(["--model", "tiny-olmoe"])).expected is None


# --- the model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "outcome"), [(0.0, "passed"), (9e-3, "passed"), (1.1e-2, "failed"), (-1.1e-2, "failed")])
def test_golden_logits_are_within_a_hundredth(directory: Path, off: float, outcome: str, monkeypatch: Patch) -> None:
    ids = (1, 30, 46, 27, 65, 31, 28, 33)
    monkeypatch.setattr(parity_checks, "GOLDEN_INPUT", ids)
    model = HookedMoE.from_pretrained(directory)
    with torch.no_grad():
        right = model(torch.tensor([ids]))[0].mean(-1).tolist()
    expected = replace(PUBLISHED["qwen1.5-moe"], golden_logits=(*right[:5], right[5] + off, *right[6:]))
    assert parity_checks.golden_logits(model, expected).outcome == outcome


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_weights_of_nan_fail(directory: Path, report: Callable[..., dict[str, Any]]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, directory / "model.safetensors")
    found = report("--model", directory, *QUICK)
    assert named(found, "failed") == MODEL[1:]
    assert {check["value"] for check in found["checks"] if check["name"] in ("loss", "noise floor")} == {"nan"}
    assert found["code"] == 1


@pytest.mark.parametrize("check", ["loss", "noise floor", "effects are exact"])
def test_a_tolerance_that_is_exceeded_fails(
    check: str, directory: Path, report: Callable[..., dict[str, Any]], monkeypatch: Patch
) -> None:
    monkeypatch.setitem(parity_checks.LOSS_TOLERANCE, torch.float32, -1.0)
    found = report("--model", directory, *QUICK)
    assert outcomes(found)[check] == "failed"


# --- against transformers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """One model run here and by transformers. DeepSeek-V2's router gives its selection in no order."""
    theirs = save(FAMILIES["deepseek_v2"].tiny(), tmp_path_factory.mktemp("hf"))
    ours, tokens = HookedMoE.from_pretrained(theirs), random_tokens(1, 20)
    there = parity_checks.transformers_run(theirs, torch.float32, torch.device("cpu"), tokens, ours.cfg.moe_layers)
    return parity_checks.our_run(ours, tokens), there


def failed(results: list[Result]) -> list[str]:
    return [result.name for result in results if result.outcome == "failed"]


def rerouted(run: Run) -> Run:
    """With another expert at one token of one layer."""
    other = run.routing[1].clone()
    other[0, 7, 0] = next(expert for expert in range(10) if expert not in other[0, 7])
    return replace(run, routing=run.routing | {1: other})


Change = Callable[[Run], Run]
CHANGES: dict[str, Change] = {
    "transformers: logits": lambda run: replace(run, logits=run.logits + 6e-5),
    "transformers: losses": lambda run: replace(run, losses=run.losses + 3e-6),
    "transformers: routing": rerouted,
}


def test_runs_of_the_same_model_agree(runs: tuple[Run, Run]) -> None:
    ours, theirs = runs
    assert failed(list(parity_checks.same_as_transformers(ours, theirs))) == []
    assert ours.losses.shape == theirs.losses.shape == (19,)
    assert theirs.routing.keys() == {1, 2}
    assert theirs.logits is not ours.logits


@pytest.mark.parametrize("check", CHANGES)
def test_a_difference_from_transformers_fails_its_check_alone(check: str, runs: tuple[Run, Run]) -> None:
    assert failed(list(parity_checks.same_as_transformers(CHANGES[check](runs[0]), runs[1]))) == [check]


def test_errors_of_losses_do_not_cancel(runs: tuple[Run, Run]) -> None:
    signs = torch.tensor([1.0, -1.0] * 9 + [0.0])
    changed = replace(runs[0], losses=runs[0].losses + 1e-4 * signs)
    assert failed(list(parity_checks.same_as_transformers(changed, runs[1]))) == ["transformers: losses"]


def test_weights_that_are_not_those_of_transformers_fail(
    directory: Path, report: Callable[..., dict[str, Any]], monkeypatch: Patch
) -> None:
    load = verify.Subject.load

    def disturbed(self: verify.Subject, dtype: torch.dtype) -> HookedMoE:
        model = load(self, dtype)
        with torch.no_grad():
            model.blocks[0].mlp.experts.W_in[3] *= 1.5  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(verify.Subject, "load", disturbed)
    found = report("--model", directory, "--tokens", 40)
    assert {"transformers: logits", "transformers: losses"} <= set(named(found, "failed"))


# --- half precision --------------------------------------------------------------------------------------------------------


def test_agreement_counts_selections_whatever_their_order() -> None:
    one = {1: torch.tensor([[[0, 1], [2, 3]]]), 4: torch.tensor([[[5, 6], [7, 0]]])}
    other = {1: torch.tensor([[[1, 0], [3, 9]]]), 4: torch.tensor([[[6, 5], [0, 7]]])}
    assert Agreement.of(one, other) == Agreement(selections=7 / 8, sets=3 / 4, lowest_layer=3 / 4)
    assert Agreement.of(one, one) == Agreement(1.0, 1.0, 1.0)


def half(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Result]:
    def load(dtype: torch.dtype) -> HookedMoE:
        return HookedMoE.from_pretrained(directory, dtype=dtype)

    _, results = parity_checks.half_precision(load, dtype, random_tokens(1, 40))
    return {result.name: result for result in results}


def test_the_same_rounded_weights_are_compared(directory: Path) -> None:
    """By their definition: with a model in float32 that has the half-precision weights, routed as it is."""
    tokens = random_tokens(1, 40)
    model = HookedMoE.from_pretrained(directory, dtype=torch.bfloat16)
    wide = HookedMoE(model.cfg.replace(dtype=torch.float32))
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference, cache = wide.run_with_cache(tokens, return_type="loss", loss_per_token=True)
        free, half_cache = model.run_with_cache(tokens, return_type="loss", loss_per_token=True)

        def as_in_float32(indices: Tensor, hook: Any) -> Tensor:
            return cache[hook.name]

        forced = model.run_with_hooks(
            tokens,
            fwd_hooks=[(lambda name: name.endswith("indices"), as_in_float32)],
            return_type="loss",
            loss_per_token=True,
        )
    found = half(directory)
    common = [
        len(set(cache["expert_indices", layer][0, pos].tolist()) & set(half_cache["expert_indices", layer][0, pos].tolist()))
        for layer in range(3)
        for pos in range(40)
    ]
    assert found["bfloat16: routing"].value == pytest.approx(sum(common) / (3 * 40 * 3))
    assert found["bfloat16: losses"].value == pytest.approx(float((forced - reference).abs().mean()), rel=1e-4)
    assert f"by {abs(float(free.mean() - reference.mean())):.2g} routed freely" in found["bfloat16: losses"].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_routes_or_loses_otherwise_fails(directory: Path, dtype: torch.dtype, monkeypatch: Patch) -> None:
    name = str(dtype).removeprefix("torch.")
    assert failed(list(half(directory, dtype).values())) == []
    run = parity_checks.our_run

    def off(model: HookedMoE, tokens: Tensor, routing: Any = None) -> Run:
        found = run(model, tokens, routing)
        if model.cfg.dtype == torch.float32:
            return found
        first = {layer: indices.roll(1, 1) for layer, indices in found.routing.items()}
        return replace(found, losses=found.losses + 0.1, routing=first)

    monkeypatch.setattr(parity_checks, "our_run", off)
    assert failed(list(half(directory, dtype).values())) == [f"{name}: routing", f"{name}: losses"]


def test_routing_unlike_that_of_transformers_fails(runs: tuple[Run, Run]) -> None:
    ours, theirs = runs
    assert parity_checks.half_against_transformers(ours, theirs, torch.bfloat16).outcome == "passed"
    shifted = replace(ours, routing={layer: indices.roll(1, 1) for layer, indices in ours.routing.items()})
    assert parity_checks.half_against_transformers(shifted, theirs, torch.bfloat16).outcome == "failed"


# --- what is not run, and what cannot be --------------------------------------------------------------------------------------


def details(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"] if check["outcome"] == "not run"}


def test_what_is_skipped_says_so(directory: Path, report: Callable[..., dict[str, Any]]) -> None:
    found = report("--model", directory, *QUICK)
    assert found["code"] == 0
    assert details(found) == {
        "census": "only for the published checkpoints; for a copy of one, --expect " + "|".join(PUBLISHED),
        "golden logits": "published for allenai/OLMoE-1B-7B-0924 and Qwen/Qwen1.5-MoE-A2.7B only",
        "transformers": "--skip-transformers",
        "half precision": "--skip-half",
    }


def test_half_precision_runs_without_transformers(
    directory: Path, report: Callable[..., dict[str, Any]], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(parity_checks, "transformers_version", lambda: None)
    found = report("--model", directory, "--tokens", 20)
    why = "transformers is not installed: pip install transformers"
    assert details(found)["transformers"] == details(found)["bfloat16: routing of transformers"] == why
    assert {"bfloat16: routing", "float16: losses"} <= set(named(found, "passed"))


@pytest.mark.parametrize(("version", "why"), [("4.57.1", "older than 5.15"), ("5.2.0", "older than 5.15"), ("5.15.0", None)])
def test_an_old_transformers_is_not_compared_with(version: str, why: str | None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    said = parity_checks.why_without_transformers()
    assert said is None if why is None else why in str(said)


def test_a_transformers_that_is_not_installed_is_no_error(monkeypatch: Patch) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert parity_checks.transformers_version() is None


def test_the_main_run_in_half_precision_leaves_out_what_is_of_float32(
    directory: Path, report: Callable[..., dict[str, Any]], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(parity_checks, "census", lambda *_: iter(()))
    found = report("--model", directory, "--expect", "olmoe", "--dtype", "bfloat16", "--skip-half", "--tokens", 20)
    assert details(found) == {
        "golden logits": "they are of float32, and this is --dtype bfloat16",
        "transformers": "compared in float32 only, and this is --dtype bfloat16",
        "half precision": "--skip-half",
    }
    assert found["code"] == 0


REFUSED = {
    "no such model": (["--model", "tiny-olmo"], "unknown model 'tiny-olmo'; did you mean 'tiny-olmoe'"),
    "no such directory": (["--model", "./nowhere"], "there is no directory './nowhere'"),
    "revision": (["--revision", "main"], "--revision 'main' is for models on the hub; 'tiny-olmoe' is the directory"),
    "too few tokens": (["--tokens", "7"], "--tokens 7: give 8 or more"),
    "no place for json": (["--json", "nowhere/report.json"], "--json nowhere/report.json: there is no directory"),
    "no such device": (["--device", "abacus"], "--device 'abacus' cannot be used here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named_in_one_line(
    case: str, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    assert verify.main(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_a_text_longer_than_the_documents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the model has room for it; a shorter context gets as much as it holds."""
    directory = Path(shutil.copytree(str(verify.locate("tiny-olmoe").directory), tmp_path / "long"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    assert verify.main(["--model", str(directory), "--tokens", "90000"]) == 1
    assert "error: --tokens 90000: no document of the held-out corpus is that long" in capsys.readouterr().err
    shipped = verify.find(verify.parse_arguments([]))
    assert verify.read_text(shipped, 90000)[0].shape == (1, 512)


def test_it_runs_as_a_script_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "verify.py"), "--model", "tiny-olmo"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown model 'tiny-olmo'; did you mean 'tiny-olmoe'")
    assert len(done.stderr.splitlines()) == 1
