"""Shards by way of an object store: the bytes of a run in threads, from a directory by its URI and from a local S3 server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hooked_moe import HookedMoE
from hooked_moe.measurement import Run, open_measurement, shard_transfer
from hooked_moe.measurement.shard_transfer import ShardTransfer
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from tests.support.number_text import number_corpus, number_reader
from tests.support.s3_server import Objects, s3_server

LENGTHS = (12, 9, 7)


@pytest.fixture
def opened(make_model: Callable[..., HookedMoE], tmp_path: Path) -> Callable[..., Run]:
    model = number_reader(make_model, n_layers=2)
    tokenized = TokenizedCorpus(model, number_corpus(tmp_path, LENGTHS), 8)
    return lambda where, **options: open_measurement(model, tokenized, results=tmp_path / where, name="run", **options)


def tables(run: Run) -> dict[str, bytes]:
    with run:
        run.require("position", progress=False)
        return {path.name: path.read_bytes() for path in sorted(run.directory.glob("*.parquet"))}


def assert_two_machines_meet_there(uri: str, opened: Callable[..., Run]) -> None:
    for number in (1, 2):
        with opened(f"machine {number}", share=Share(number, 2), object_store=uri) as run:
            run.require("position", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hooked_moe.measurement.shards.measure_document", lambda *_: pytest.fail("was measured twice"))
        merged = tables(opened("machine 3", object_store=uri))
    assert merged == tables(opened("alone"))


def test_a_directory_serves_as_an_object_store(opened: Callable[..., Run], tmp_path: Path) -> None:
    assert_two_machines_meet_there((tmp_path / "store").as_uri(), opened)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]  # cleared once all is merged


def test_what_has_no_record_is_measured_again(
    opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (tmp_path / "store").as_uri()
    original = ShardTransfer.put

    def cut_off(self: ShardTransfer, directory: Path, names: list[str]) -> None:
        original(self, directory, names[:-1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, opened("killed", share=Share(1, 1), object_store=uri) as run:
        patch.setattr(shard_transfer.ShardTransfer, "put", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.require("position", progress=False)
    assert tables(opened("again", object_store=uri)) == tables(opened("alone"))


@pytest.mark.parametrize("uri", ["", "nowhere", "ftp://host/path", "s3:/"])
def test_what_is_no_store_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="names no file system that pyarrow knows"):
        ShardTransfer(uri)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Objects]]:
    """The URI of a bucket on a server of this process, and what that holds."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_server() as (address, held):
        held.buckets.add("shards")
        yield f"s3://shards/of/runs?endpoint_override={address}&scheme=http&region=us-east-1", held


def test_an_s3_server_serves_as_an_object_store(opened: Callable[..., Run], server: tuple[str, Objects]) -> None:
    uri, held = server
    assert_two_machines_meet_there(uri, opened)
    assert not any(held.objects.values())  # nothing but the marks of empty directories
    assert not held.uploads


def test_files_of_any_size_come_back_as_they_were(server: tuple[str, Objects], tmp_path: Path) -> None:
    uri, held = server
    (tmp_path / "here").mkdir()
    sizes = {"large.parquet": 11_000_000, "small.parquet": 17, "empty.parquet": 0, "000000.json": 2}  # the first in parts
    contents = {name: os.urandom(size) for name, size in sizes.items()}
    for name, data in contents.items():
        (tmp_path / "here" / name).write_bytes(data)
    ShardTransfer.below(uri, "run").put(tmp_path / "here", sizes)
    ShardTransfer.below(uri, "run").fetch(tmp_path / "there")
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == contents
    assert list(held.objects) == [f"/shards/of/runs/run/{name}" for name in sizes]  # the record last


def test_a_store_without_the_bucket_is_named(server: tuple[str, Objects], tmp_path: Path) -> None:
    uri = server[0].replace("shards", "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write shards to s3://nowhere/of/runs"):
        ShardTransfer(uri).put(tmp_path, ["file"])
