"""How files are written: whole or not at all; and what every column of every table says of itself."""

import errno
import json
import os

import pyarrow.parquet as pq
import pytest

from hooked_moe import tables
from hooked_moe.analysis.accumulators.expert_statistics import ExpertAccumulator
from hooked_moe.analysis.cells import cells_table
from hooked_moe.analysis.criteria import criteria_table
from tests.support.synthetic_effects import synthetic_effects
from tests.support.whole_tables import read_effects


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "file.txt"
    tables.write_text_atomic("old", target)

    def interrupted() -> None:
        with tables.atomic_path(target) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_reader_keeps_the_old_file_whole_while_the_new_one_takes_its_name(tmp_path):
    tables.write_text_atomic("old", tmp_path / "file.txt")
    with open(tmp_path / "file.txt") as reader:
        tables.write_text_atomic("new", tmp_path / "file.txt")
        assert reader.read() == "old"
    assert (tmp_path / "file.txt").read_text() == "new"


def test_a_killed_writer_leaves_the_final_name_alone(tmp_path):
    """A child process dies by SIGKILL inside the block: nothing under the final name, one temporary to sweep."""
    child = os.fork()
    if child == 0:
        with tables.atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert not (tmp_path / "file.txt").exists()
    assert tables.remove_temporaries(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_a_full_disk_and_missing_directories_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"the directory .*nowhere does not exist"):
        tables.write_text_atomic("x", tmp_path / "nowhere" / "file.txt")
    (tmp_path / "plain").write_text("")
    with pytest.raises(OSError, match=r"plain is not a directory"):
        tables.write_text_atomic("x", tmp_path / "plain" / "file.txt")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*file.txt: No space left on device; free some space") as caught:
        tables.write_text_atomic("x", tmp_path / "file.txt")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["plain"]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    tables.write_json_atomic({"b": 1, "a": [True, None]}, tmp_path / "x.json")
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON"):
        tables.write_json_atomic({"a": float("nan")}, tmp_path / "y.json")
    assert not (tmp_path / "y.json").exists()


def test_every_column_of_every_schema_has_a_meaning_and_a_unit():
    experts = ExpertAccumulator((0, 1, 2), 16)
    experts.update(read_effects(synthetic_effects(n_documents=2, n_tokens=10)))
    measured = ("EFFECTS", "EFFECTS_SEQUENCE", "PROGRESSIVE", "ROUTING", "EXPERT_WEIGHTS", "TOKENS", "DOCUMENTS")
    for schema in (
        *(getattr(tables, name) for name in measured),
        cells_table([]).schema,
        criteria_table(experts.statistics()).schema,
    ):
        for column in schema:
            assert set(column.metadata) == {b"meaning", b"unit"}, column.name
            assert all(column.metadata.values()), column.name
    assert tables.EFFECTS.field("gap_norm").metadata[b"meaning"].startswith(b"g ||E")


def test_meanings_travel_with_the_file(tmp_path):
    tables.write_parquet_atomic(synthetic_effects(n_documents=1, n_tokens=3), tmp_path / "effects.parquet")
    field = tables.EFFECTS.field("delta_loss")
    assert pq.read_schema(tmp_path / "effects.parquet").field("delta_loss").metadata == field.metadata
