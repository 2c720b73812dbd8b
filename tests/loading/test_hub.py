"""What names stand for, and how the hub's client is asked, which is replaced here; `test_downloads.py` has the real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hooked_moe import HookedMoE
from hooked_moe.checks import UnknownNameError
from hooked_moe.loading import PRETRAINED, CheckpointError, HubError, registry
from tests.support.hf_models import save, tiny_olmoe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A hub with one repository, which records how it is asked. `fail[call]` is raised by that call."""

    def __init__(self, cache: Path) -> None:
        self.snapshot = save(tiny_olmoe(), cache / "snapshots" / COMMIT)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fail: dict[str, Exception] = {}

    def _record(self, call: str, repository: str, **options: Any) -> None:
        self.calls.append((call, {"repository": repository} | options))
        if call in self.fail:
            raise self.fail[call]

    def model_info(self, repository: str, **options: Any) -> SimpleNamespace:
        self._record("resolve", repository, **options)
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=file.name) for file in self.snapshot.iterdir()])

    def hf_hub_download(self, repository: str, file: str, **options: Any) -> str:
        self._record("file", repository, file=file, **options)
        return str(self.snapshot / file)

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self._record("snapshot", repository, **options)
        return str(self.snapshot)

    @property
    def asked(self) -> list[str]:
        return [call for call, _ in self.calls]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=fake.model_info))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(
        status, request=httpx2.Request("GET", "https://huggingface.co/someone/olmoe-like/resolve/main/config.json")
    )


# The hub


def test_the_revision_is_pinned_and_only_safetensors_json_and_templates_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    model = HookedMoE.from_pretrained("someone/olmoe-like", revision="main", cache_dir=tmp_path)
    (_, resolve), (_, file), (_, snapshot) = hub.calls
    assert hub.asked == ["resolve", "file", "snapshot"]
    assert (resolve["repository"], resolve["revision"]) == ("someone/olmoe-like", "main")
    assert resolve["timeout"] is not None
    assert (file["file"], file["revision"], file["cache_dir"]) == ("config.json", COMMIT, str(tmp_path))
    assert (snapshot["revision"], snapshot["cache_dir"]) == (COMMIT, str(tmp_path))
    assert snapshot["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
    assert model.cfg.revision == COMMIT
    assert model.cfg.model_name == "someone/olmoe-like"


def test_the_patterns_leave_pickles_code_and_other_copies_on_the_hub(hub: FakeHub) -> None:
    HookedMoE.from_pretrained("someone/olmoe-like")
    patterns = {key: hub.calls[-1][1][key] for key in ("allow_patterns", "ignore_patterns")}
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json"]
    wanted += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    unwanted = [
        "onnx/config.json",
        "assets/model.safetensors",
        "pytorch_model.bin",
        "model.pt",
        "modeling_olmoe.py",
        "consolidated.00.safetensors",
        "original/model.safetensors",
    ]
    filtered = huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], **patterns)
    assert list(filtered) == wanted


def test_an_unsupported_architecture_is_refused_before_its_weights_are_fetched(hub: FakeHub) -> None:
    (hub.snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match=r"'gpt2' is not supported; supported are: olmoe"):
        HookedMoE.from_pretrained("someone/gpt2-like")
    assert hub.asked == ["resolve", "file"]


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_only_the_cache_is_looked_at(how: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    model = HookedMoE.from_pretrained("someone/olmoe-like", local_files_only=how == "argument")
    assert hub.asked == ["file", "snapshot"]
    assert all(options["local_files_only"] for _, options in hub.calls)
    assert model.cfg.revision == COMMIT


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        (
            "resolve",
            errors.RepositoryNotFoundError("404", response=answer(404)),
            "neither a directory here nor a model on the hub",
        ),
        ("resolve", errors.GatedRepoError("403", response=answer(403)), "hf auth login"),
        ("resolve", errors.RevisionNotFoundError("404", response=answer(404)), "no revision 'v9'"),
        ("resolve", errors.HfHubHTTPError("503", response=answer(503)), "local_files_only=True"),
        ("resolve", httpx2.ConnectError("no route"), "check the connection"),
        ("resolve", OSError("disk full"), "disk full"),
        ("file", errors.RemoteEntryNotFoundError("404", response=answer(404)), "no config.json"),
        ("snapshot", errors.LocalEntryNotFoundError("timed out"), "check the connection"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_refuses_is_explained(call: str, error: Exception, advice: str, hub: FakeHub) -> None:
    hub.fail[call] = error
    with pytest.raises(HubError, match=advice) as caught:
        HookedMoE.from_pretrained("someone/olmoe-like", revision="v9")
    assert "someone/olmoe-like" in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_model_that_is_not_in_the_cache_says_how_to_get_it_there(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"is not in the local cache: load it once online"):
        HookedMoE.from_pretrained("olmoe", cache_dir=tmp_path, local_files_only=True)


# Names


@pytest.mark.parametrize("name", ["olmoe", "OLMoE", "olmoe-1b-7b"])
def test_short_names_and_aliases_stand_for_models_on_the_hub(name: str, hub: FakeHub) -> None:
    model = HookedMoE.from_pretrained(name)
    assert hub.calls[0][1]["repository"] == model.cfg.model_name == "allenai/OLMoE-1B-7B-0924"


def test_no_two_short_names_are_the_same() -> None:
    names = [name for entry in PRETRAINED for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)


def test_an_unknown_name_lists_the_nearest_and_what_is_accepted() -> None:
    with pytest.raises(UnknownNameError, match=r"'olmo'; did you mean 'olmoe'.*hub ids as 'org/name'"):
        HookedMoE.from_pretrained("olmo")


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c", Path("nowhere"), "~/nowhere"])
def test_a_path_that_does_not_exist_is_named(path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        HookedMoE.from_pretrained(path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match="is a file; give the directory"):
        HookedMoE.from_pretrained(tmp_path / "model.safetensors")


def test_a_directory_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        HookedMoE.from_pretrained(tmp_path)


def test_a_path_is_never_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tiny_olmoe(), tmp_path / "olmoe")
    for path in (Path("olmoe"), "./olmoe"):
        assert HookedMoE.from_pretrained(path).cfg.d_vocab == 97


def test_a_shipped_model_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks the model 'tiny-olmoe'.*reinstall"):
        HookedMoE.from_pretrained("tiny-olmoe")
    save(tiny_olmoe(), tmp_path / "pretrained" / "tiny-olmoe")
    assert HookedMoE.from_pretrained("tiny-olmoe").cfg.model_name == "tiny-olmoe"


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision='main' is for models on the hub"):
        HookedMoE.from_pretrained(save(tiny_olmoe(), tmp_path), revision="main")
