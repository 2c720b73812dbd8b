"""Shards by way of an object store: the bytes of a run in threads, from a directory by its URI and from a local S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from hooked_moe import HookedMoE
from hooked_moe.measurement import Run, open_measurement, shard_transfer
from hooked_moe.measurement.shard_transfer import ShardTransfer
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from tests.support.number_text import number_corpus, number_reader

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
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a bucket on a server of this process."""
    server = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    running: Any = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    store = pyarrow.fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    store.create_dir("shards")
    yield f"s3://shards/of/runs?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    running.stop()


@pytest.mark.slow
def test_an_s3_server_serves_as_an_object_store(opened: Callable[..., Run], bucket: str) -> None:
    assert_two_machines_meet_there(bucket, opened)
