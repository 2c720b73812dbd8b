"""Models and data sets from a hub, through the real client: a server on 127.0.0.1 stands in for huggingface.co."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from hooked_moe import HookedMoE
from hooked_moe.corpus import load_corpus
from hooked_moe.loading import HubError
from tests.support.hf_models import tiny_olmoe
from tests.support.hub_server import HubServer, files_of, hub_for

OLMOE = "allenai/OLMoE-1B-7B-0924"
OTHERS = {
    "README.md": b"# a model",
    "pytorch_model.bin": b"a pickle",
    "modeling_olmoe.py": b"raise SystemExit('code from the hub was run')",
    "consolidated.00.safetensors": b"the same weights again",
    "original/model.safetensors": b"and again",
    "original/params.json": b"{}",
}
OFFLINE = ["local_files_only", "HF_HUB_OFFLINE"]


@functools.cache
def olmoe_files(factor: float = 1.0) -> dict[str, bytes]:
    """A tiny OLMoE in several files, beside what must not be fetched; its weights are multiplied by the factor."""
    model = tiny_olmoe()
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        for parameter in model.parameters():
            parameter.mul_(factor)
        model.save_pretrained(directory, save_original_format=True, max_shard_size="200KB")
        return files_of(Path(directory)) | OTHERS


WANTED = sorted(olmoe_files().keys() - OTHERS.keys())
SHARDS = [name for name in WANTED if name.endswith(".safetensors")]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_for(cache, monkeypatch) as server:
        yield server


@pytest.fixture
def first(hub: HubServer) -> str:
    """The commit that the branch main and the tag v1 are at first."""
    return hub.publish(OLMOE, olmoe_files(), "main", "v1", "refs/pr/1")


@pytest.fixture
def move(hub: HubServer) -> Callable[[], str]:
    """Move the branch main on to a model with other weights; returns the commit."""
    return lambda: hub.publish(OLMOE, olmoe_files(2.0), "main")


def is_first(model: HookedMoE) -> bool:
    """Whether all weights are those of the first commit; if not, all are of the second."""
    expected, other = expected_weights(1.0), expected_weights(2.0)
    found = dict(model.named_parameters())
    same = [torch.equal(found[name], expected[name]) for name in expected]
    assert all(same) or all(torch.equal(found[name], other[name]) for name in other), "two states were mixed"
    return all(same)


@functools.cache
def expected_weights(factor: float) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        for name, data in olmoe_files(factor).items():
            if "/" not in name:
                (Path(directory) / name).write_bytes(data)
        return dict(HookedMoE.from_pretrained(directory).named_parameters())


def refusal(name: str = "olmoe", **options: object) -> str:
    """The one line with which a load is refused."""
    with pytest.raises(HubError) as caught:
        HookedMoE.from_pretrained(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    return str(caught.value)


def go_offline(how: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Switch the hub off; returns the arguments for what is loaded from then on."""
    hub.stop()
    if how == "local_files_only":
        return {"local_files_only": True}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return {}


# Downloaded once, then offline


@pytest.mark.parametrize("how", OFFLINE)
@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1", "commit"])
def test_what_was_downloaded_once_is_found_offline_by_the_same_name(
    revision: str | None, how: str, hub: HubServer, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = first if revision == "commit" else revision
    online = HookedMoE.from_pretrained("olmoe", revision=revision)
    offline = HookedMoE.from_pretrained("olmoe", revision=revision, **go_offline(how, hub, monkeypatch))
    for model in (online, offline):
        assert is_first(model)
        assert (model.cfg.model_name, model.cfg.revision) == (OLMOE, first)
    # The client itself, and so transformers, finds it too.
    config = huggingface_hub.hf_hub_download(OLMOE, "config.json", revision=revision, local_files_only=True)
    assert Path(config).parent.name == first


def test_what_one_process_downloaded_another_finds_with_the_environment_set_to_offline(
    hub: HubServer, first: str, cache: Path
) -> None:
    HookedMoE.from_pretrained("olmoe")
    hub.stop()
    script = "from hooked_moe import HookedMoE; print(HookedMoE.from_pretrained('olmoe').cfg.revision)"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.url}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [first]


def test_a_streamed_model_is_read_from_the_cache(hub: HubServer, first: str) -> None:
    tokens = torch.arange(10)[None]
    expected = HookedMoE.from_pretrained("olmoe")(tokens)
    hub.stop()
    streamed = HookedMoE.from_pretrained("olmoe", stream=True, local_files_only=True)
    assert torch.equal(streamed(tokens), expected)
    assert streamed.cfg.revision == first


@pytest.mark.usefixtures("first")
def test_only_safetensors_and_json_are_fetched_and_config_first(hub: HubServer) -> None:
    HookedMoE.from_pretrained("olmoe")
    assert hub.fetched() == WANTED
    assert hub.requests[2].endswith("/config.json")


@pytest.mark.usefixtures("first")
def test_a_second_load_only_asks_what_the_branch_is(hub: HubServer) -> None:
    HookedMoE.from_pretrained("olmoe")
    hub.requests.clear()
    HookedMoE.from_pretrained("olmoe")
    assert hub.requests == [f"GET /api/models/{OLMOE}"]


def test_a_cache_that_cannot_be_told_the_commit_is_warned_of(hub: HubServer, first: str, cache: Path) -> None:
    refs = cache / f"models--{OLMOE.replace('/', '--')}" / "refs"
    refs.parent.mkdir(parents=True)
    refs.touch()  # a file where a directory has to be
    with pytest.warns(UserWarning, match=rf"that '{OLMOE}' is commit {first} .*: to load it offline, give revision='{first}'"):
        HookedMoE.from_pretrained("olmoe")
    hub.stop()
    assert is_first(HookedMoE.from_pretrained("olmoe", revision=first, local_files_only=True))


# Branches that move


def test_a_branch_that_moved_is_followed_and_what_it_was_stays(hub: HubServer, first: str, move: Callable[[], str]) -> None:
    HookedMoE.from_pretrained("olmoe")
    second = move()
    assert not is_first(HookedMoE.from_pretrained("olmoe"))
    hub.stop()
    for revision, commit in ((None, second), ("main", second), (first, first)):
        model = HookedMoE.from_pretrained("olmoe", revision=revision, local_files_only=True)
        assert model.cfg.revision == commit
        assert is_first(model) == (commit == first)


@pytest.mark.parametrize("when", ["^HEAD .*/config.json", "/tree/", f"^HEAD .*/{SHARDS[1]}"])
def test_a_branch_that_moves_in_mid_download_gives_the_state_it_was_in(
    when: str, hub: HubServer, first: str, move: Callable[[], str]
) -> None:
    hub.on(when, move)
    online = HookedMoE.from_pretrained("olmoe")
    assert len(hub.stored[OLMOE].commits) == 2
    hub.stop()
    for model in (online, HookedMoE.from_pretrained("olmoe", local_files_only=True)):
        assert is_first(model)
        assert model.cfg.revision == first


def test_a_cut_short_download_of_a_moved_branch_leaves_the_earlier_state_to_be_found_offline(
    hub: HubServer, first: str, move: Callable[[], str]
) -> None:
    HookedMoE.from_pretrained("olmoe")
    move()
    hub.cut(f"^GET .*/{SHARDS[2]}", 1000, times=100)
    assert f"or load commit {first}, which is in the local cache, with local_files_only=True" in refusal()
    hub.stop()
    model = HookedMoE.from_pretrained("olmoe", local_files_only=True)
    assert is_first(model)
    assert model.cfg.revision == first


# Connections that are lost


@pytest.mark.usefixtures("first")
def test_a_file_whose_connection_is_lost_is_resumed_where_it_was(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut(f"^GET .*/{SHARDS[2]}", 1000)
    assert is_first(HookedMoE.from_pretrained("olmoe"))
    assert [request.split("/")[-1] for request in hub.requests if "bytes=" in request] == [f"{SHARDS[2]} bytes=1000-"]


def test_a_download_that_is_cut_short_is_completed_by_the_next_one(hub: HubServer, first: str) -> None:
    hub.cut(f"^GET .*/{SHARDS[2]}", 1000, times=100)
    assert "check the connection and try again" in refusal()
    by_name, by_commit = refusal(local_files_only=True), refusal(revision=first, local_files_only=True)
    assert f"'{OLMOE}' is not in the local cache: load it once online" in by_name
    assert f"has other commits of it, to be given as revision: {first} (" in by_name
    assert f"'{OLMOE}' at revision '{first}' is only partly in the local cache (" in by_commit
    for line in (by_name, by_commit):
        assert "file(s) are missing" in line
        assert ".safetensors" in line

    here = {path.name for path in Path(constants.HF_HUB_CACHE).rglob(f"snapshots/{first}/*")}
    hub.rules.clear()
    hub.requests.clear()
    assert is_first(HookedMoE.from_pretrained("olmoe"))
    assert hub.fetched() == sorted(set(WANTED) - here)
    assert SHARDS[2] in hub.fetched()
    hub.stop()
    assert is_first(HookedMoE.from_pretrained("olmoe", local_files_only=True))


def test_without_the_hub_a_branch_is_refused_naming_the_state_that_is_in_the_cache(hub: HubServer, first: str) -> None:
    HookedMoE.from_pretrained("olmoe")
    hub.stop()
    assert f"could not fetch '{OLMOE}' from {hub.url} (ConnectError: " in refusal()
    assert refusal().endswith(
        f"check the connection and try again; or load commit {first}, which is in the local cache, with local_files_only=True or "
        "HF_HUB_OFFLINE=1"
    )
    assert "local_files_only" not in refusal(revision="v2")  # which was never downloaded
    assert refusal(revision="v2").endswith("or give a local directory")


@pytest.mark.parametrize("trouble", ["stopped", "503", "429"])
def test_without_the_hub_a_commit_is_loaded_from_the_cache_with_a_warning(trouble: str, hub: HubServer, first: str) -> None:
    HookedMoE.from_pretrained("olmoe")
    if trouble == "stopped":
        hub.stop()
    else:
        hub.refuse("/api/", int(trouble))
    with pytest.warns(
        UserWarning, match=rf"could not ask the hub for '{OLMOE}' at revision '{first}' \(.*a commit never changes"
    ):
        model = HookedMoE.from_pretrained("olmoe", revision=first)
    assert is_first(model)
    assert model.cfg.revision == first


# Refusals

STAGES = {
    "the name": "^GET /api/models/[^/]+/[^/]+$",
    "config.json": "^HEAD",
    "the list": "/tree/",
    "weights": "^GET .*safetensors",
}
REFUSALS = [
    (
        401,
        "",
        "Invalid credentials in Authorization header",
        "(401 Unauthorized: Invalid credentials in Authorization header): log in",
    ),
    (401, "RepoNotFound", "", "(401 Unauthorized): check the spelling; if it is private, log in with `hf auth login`"),
    (401, "GatedRepo", "", "is gated (401 Unauthorized): ask for access at"),
    (403, "GatedRepo", "", "is gated (403 Forbidden): ask for access at"),
    (403, "", "No rights", "(403 Forbidden: No rights): give a token that may read it: log in with `hf auth login`"),
    (404, "RepoNotFound", "", "(404 Not Found): check the spelling; if it is private, log in with `hf auth login`"),
    (429, "", "", "(429 Too Many Requests): too much was asked of the hub from here: wait some minutes, or log in"),
    (500, "", "", "(500 Internal Server Error): the trouble is the hub's own: try again later"),
    (503, "", "", "(503 Service Unavailable): the trouble is the hub's own: try again later"),
]


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize(
    ("stage", "status", "code", "message", "advice"),
    [(stage, *refused) for stage in STAGES for refused in REFUSALS if stage == "the name" or refused[0] in (403, 503)],
)
def test_what_the_hub_refuses_is_one_line_with_the_model_the_status_and_what_to_do(
    stage: str, status: int, code: str, message: str, advice: str, hub: HubServer
) -> None:
    hub.refuse(STAGES[stage], status, code, message)
    line = refusal()
    assert f"'{OLMOE}'" in line
    assert advice in line


def test_how_long_to_wait_is_said_where_the_hub_says_it(hub: HubServer) -> None:
    hub.refuse("/api/", 429, Retry_After="30")
    assert "wait 30 seconds, or log in" in refusal()


def test_what_the_hub_does_not_have_is_named(hub: HubServer) -> None:
    hub.publish("someone/empty", {"README.md": b""}, "main")
    assert "'someone/other' is neither a directory here nor a model on the hub" in refusal("someone/other")
    assert "'someone/empty' has no revision 'v9' (404 Not Found): give a branch, a tag" in refusal("someone/empty", revision="v9")
    assert "'someone/empty' has no config.json on the hub (404 Not Found): it is not a model" in refusal("someone/empty")


def test_an_answer_that_is_not_the_hubs_is_told_from_one_that_is(hub: HubServer) -> None:
    hub.rule("/api/", lambda handler: handler.answer(200, b"<html>Welcome to the WiFi</html>"))
    assert f"what answers at {hub.url} is not the hub: check HF_ENDPOINT" in refusal()


def test_a_refused_model_that_is_in_the_cache_can_still_be_loaded_from_there(hub: HubServer, first: str) -> None:
    HookedMoE.from_pretrained("olmoe")
    hub.refuse("/api/", 403, "GatedRepo")
    assert f"or load commit {first}, which is in the local cache" in refusal()


# Data sets

WIKITEXT = "datasets/Salesforce/wikitext"
TEST_SPLIT = "wikitext-2-raw-v1/test-00000-of-00001.parquet"


def wikitext(title: str) -> dict[str, bytes]:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["", f" = {title} = \n", "", " A text . \n"]}), file)
    return {TEST_SPLIT: file.getvalue(), "wikitext.py": b"raise SystemExit", "README.md": b""}


@pytest.fixture
def data_set(hub: HubServer) -> str:
    return hub.publish(WIKITEXT, wikitext("First"), "main", "v1")


def title(**options: object) -> str:
    (document,) = load_corpus("wikitext-2", **options).documents  # type: ignore[arg-type]
    return document.title


def refused_data_set(**options: object) -> str:
    with pytest.raises(HubError) as caught:
        load_corpus("wikitext-2", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "data set 'Salesforce/wikitext'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("how", OFFLINE)
@pytest.mark.parametrize("revision", [None, "main", "v1", "commit"])
def test_a_data_set_that_was_downloaded_once_is_found_offline_by_the_same_name(
    revision: str | None, how: str, hub: HubServer, data_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = data_set if revision == "commit" else revision
    assert title(revision=revision) == "First"
    assert hub.fetched() == [Path(TEST_SPLIT).name]
    assert title(revision=revision, **go_offline(how, hub, monkeypatch)) == "First"


@pytest.mark.usefixtures("data_set")
def test_a_data_set_that_moved_is_followed_unless_the_download_is_cut_short(hub: HubServer) -> None:
    assert title() == "First"
    hub.publish(WIKITEXT, wikitext("Second"), "main")
    hub.cut("^GET .*parquet", 100, times=100)
    assert "check the connection and try again" in refused_data_set()
    assert title(local_files_only=True) == "First"
    hub.rules.clear()
    assert title() == title(local_files_only=True) == "Second"
    assert title(revision="v1", local_files_only=False) == "First"


def test_without_the_hub_a_data_set_is_refused_by_name_and_loaded_by_commit(hub: HubServer, data_set: str) -> None:
    assert title() == "First"
    hub.stop()
    assert refused_data_set().endswith(
        f"or load commit {data_set}, which is in the local cache, with local_files_only=True or HF_HUB_OFFLINE=1"
    )
    with pytest.warns(UserWarning, match="a commit never changes"):
        assert title(revision=data_set) == "First"


@pytest.mark.usefixtures("data_set")
@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "RepoNotFound", "is not on the hub (401 Unauthorized): check the spelling; if it is private, log in"),
        (403, "GatedRepo", "is gated (403 Forbidden): ask for access at http://127.0.0.1:{port}/datasets/Salesforce/wikitext"),
        (404, "RevisionNotFound", "has no revision 'v9' (404 Not Found): give a branch, a tag or a full commit hash"),
        (429, "", "(429 Too Many Requests): too much was asked of the hub from here: wait some minutes"),
        (
            503,
            "",
            "(503 Service Unavailable): the trouble is the hub's own: try again later; or use the shipped corpus 'held-out'",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["^GET /api", "^HEAD"])
def test_a_data_set_that_the_hub_refuses_is_one_line_with_what_to_do(
    stage: str, status: int, code: str, advice: str, hub: HubServer
) -> None:
    if stage == "^HEAD":
        hub.rule("/api/", lambda handler: handler.describe(WIKITEXT, None, "main") is None)
    hub.refuse(stage, status, code)
    assert advice.format(port=hub.url.split(":")[-1]) in refused_data_set(revision="v9")


def test_a_data_set_that_is_nowhere_says_how_to_get_it(hub: HubServer) -> None:
    hub.stop()
    assert refused_data_set().endswith("check the connection and try again; or use the shipped corpus 'held-out'")
    assert "is not in the local cache: load it once online" in refused_data_set(local_files_only=True)


@pytest.mark.usefixtures("first", "data_set")
def test_ordinary_loads_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for local_files_only in (False, True):
            HookedMoE.from_pretrained("olmoe", local_files_only=local_files_only)
            title(local_files_only=local_files_only)
