"""What the files of a run are made of, by checksums: whatever changes is noticed, and nothing else is."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hooked_moe.tables import (
    NOT_MADE,
    Ledger,
    file_fault,
    file_record,
    ledger,
    read_csv,
    read_json,
    read_parquet,
    write_derived,
    write_parquet_atomic,
)
from tests.support.damage import DAMAGES, flip_bit

TABLE = pa.table({"layer": [0, 1], "value": [0.5, -1.0]})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two inputs, of which one is absent, and a table that was made of them."""
    write_parquet_atomic(TABLE, tmp_path / "effects.parquet")
    write_derived(tmp_path, "sums", {"sums.csv": TABLE}, ["effects.parquet", "routing.parquet"], "hooked-moe sums")
    return tmp_path


def fault(run: Path, *inputs: str, **settings: object) -> str | None:
    return Ledger(run).fault("sums", inputs or ("effects.parquet", "routing.parquet"), settings)


def test_what_was_made_of_the_files_that_there_are_is_made_once(run: Path) -> None:
    assert fault(run) is None
    assert Ledger(run).faults() == {}
    for path in run.iterdir():
        os.utime(path, (0, 0))  # a clock that went back says nothing
    assert fault(run) is None
    assert Ledger(run).fault("others", (), {}) == NOT_MADE


def test_another_input_setting_or_version_is_a_reason(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault(run, "effects.parquet") == "it was made of other files"
    assert fault(run, n=1) == "it was made with other settings"
    write_parquet_atomic(TABLE.slice(1), run / "effects.parquet")
    os.utime(run / "effects.parquet", (0, 0))
    assert fault(run) == "made of another effects.parquet than there is now"
    assert Ledger(run).faults() == {
        "sums.csv": "made of another effects.parquet than there is now; `hooked-moe sums` makes it again"
    }
    write_parquet_atomic(TABLE, run / "effects.parquet")
    assert fault(run) is None
    write_parquet_atomic(TABLE, run / "routing.parquet")  # which was not there
    assert fault(run) == "made of another routing.parquet than there is now"
    (run / "routing.parquet").unlink()
    monkeypatch.setattr(ledger, "__version__", "99")
    assert "and this is 99" in (fault(run) or "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_is_noticed_and_an_input_too(run: Path, damage: Callable[[Path, random.Random], None]) -> None:
    chance = random.Random(0)
    kept = {name: (run / name).read_bytes() for name in ("sums.csv", "effects.parquet")}
    for name, content in kept.items():
        for _ in range(20):
            damage(run / name, chance)
            assert name in (fault(run) or "")
            assert list(Ledger(run).faults()) == ["sums.csv"]
            (run / name).write_bytes(content)
            assert fault(run) is None


def test_a_flipped_bit_of_the_ledger_makes_things_again_or_changes_nothing(run: Path) -> None:
    chance, content = random.Random(1), (run / "analysis.json").read_bytes()
    noticed = 0
    for _ in range(200):
        flip_bit(run / "analysis.json", chance)
        noticed += fault(run) is not None
        Ledger(run).faults()  # raises nothing
        (run / "analysis.json").write_bytes(content)
    assert noticed > 190  # the rest are in white space


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"derivations": []}', '{"derivations": {"sums": 3}}', "[" * 100_000])
def test_a_ledger_that_is_none_says_nothing(run: Path, text: str) -> None:
    (run / "analysis.json").write_text(text)
    assert fault(run) is not None
    assert Ledger(run).faults() == {}
    write_derived(run, "sums", {"sums.csv": TABLE}, ["effects.parquet", "routing.parquet"], "")
    assert fault(run) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(not_measured={"others.csv": "it was not worth it"}),
        lambda values: values["derivations"]["sums"].update(command=""),
        lambda values: values["derivations"]["sums"]["outputs"].clear(),
        lambda values: values.pop("checksum"),
    ],
)
def test_a_ledger_that_was_changed_says_nothing(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((run / "analysis.json").read_text())
    change(values)
    (run / "analysis.json").write_text(json.dumps(values))
    assert fault(run) == "analysis.json is damaged"
    assert Ledger(run).not_measured == {}
    assert Ledger(run).unrecorded(["sums.csv", "absent.csv"]) == {"sums.csv": "analysis.json is damaged"}


def test_files_that_are_not_written_any_more_are_deleted_and_a_file_has_one_maker(run: Path) -> None:
    write_derived(run, "sums", {"others.csv": TABLE}, ["effects.parquet"], "")
    assert not (run / "sums.csv").exists()
    write_derived(run, "second", {"others.csv": TABLE}, [], "")
    assert "sums" not in Ledger(run)
    write_parquet_atomic(TABLE.slice(1), run / "effects.parquet")
    assert Ledger(run).faults() == {}  # the second maker reads no effects


def test_a_record_is_of_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert file_record(path) is None
    path.write_bytes(b"0123456789")
    record = file_record(path)
    assert file_fault(path, record) is None
    path.write_bytes(b"0123456788")
    assert file_fault(path, record) == "does not have the checksum that it was written with"
    path.write_bytes(b"0123")
    assert file_fault(path, record) == "has 4 bytes, and 10 were written"
    for other in (None, {}, {"bytes": 4, "sha256": 3}, 3):
        assert file_fault(path, other) == "has no readable checksum"


def test_pages_carry_checksums_which_are_compared(tmp_path: Path) -> None:
    """Of 9,000 numbers that compress badly, so that nearly all of the file is pages: a flipped bit is no other number."""
    chance = random.Random(0)
    values = pa.table({"value": [chance.random() for _ in range(9000)]})
    path = tmp_path / "table.parquet"
    write_parquet_atomic(values, path)
    content = path.read_bytes()
    for place in range(100, len(content) - 2000, len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"table\.parquet cannot be read \(.*\): it is damaged"):
            read_parquet(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 10, b"\x00" * 64, b"a,b\n1\n\xff\xfe"])
def test_what_cannot_be_read_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    for name, read in (("x.parquet", read_parquet), ("x.csv", read_csv), ("x.json", read_json)):
        path = tmp_path / name
        path.write_bytes(content)
        if name == "x.csv" and content in (b"PAR1", b"PAR1" * 10):
            continue  # a table of one column and no rows
        with pytest.raises(ValueError, match=rf"{name} .*remove it, and the command that wrote it makes it again"):
            read(path)


def test_a_ledger_is_of_json_that_sorts(run: Path) -> None:
    before = (run / "analysis.json").read_bytes()
    write_derived(run, "sums", {"sums.csv": TABLE}, ["routing.parquet", "effects.parquet"], "hooked-moe sums")
    assert (run / "analysis.json").read_bytes() == before
    assert json.loads(before)["not_measured"] == {}
