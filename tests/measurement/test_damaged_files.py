"""A run whose files were damaged, lost or exchanged: it says so, makes them again, and never takes them for what they are not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hooked_moe import HookedMoE
from hooked_moe.measurement import Run, open_measurement, shards
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.part_spec import PartSpec
from hooked_moe.measurement.shard_files import ShardFiles
from hooked_moe.measurement.shards import measure_part
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import file_record, read_checked_json, write_checked_json
from tests.support.damage import DAMAGES, cut_short, delete, flip_bit
from tests.support.number_text import number_corpus, number_reader

LENGTHS = (12, 9, 10)
SOME = [(0, 1), (0, 5), (1, 3)]
NAMES = list(TABLES["position"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TokenizedCorpus]:
    from tests.conftest import random_model

    model = number_reader(random_model, n_layers=2)
    read = number_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS)
    return lambda: TokenizedCorpus(model, read, 8)


@pytest.fixture(scope="module")
def model(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> HookedMoE:
    from tests.conftest import random_model

    return number_reader(random_model, n_layers=2)


class Measurement:
    """A part in a directory, measured as often as is asked; `notes` are the lines of its log."""

    def __init__(self, model: HookedMoE, corpus: TokenizedCorpus, directory: Path, plan: str = "p") -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.shards, self.notes = directory, directory / "shards", []
        self._inputs = (model, corpus, PartSpec("position", (0, 1)), self.shards, directory, {"plan": plan})

    def measure(self) -> dict[str, bytes]:
        self.notes.clear()
        measure_part(*self._inputs, progress=False, log=self.notes.append)
        return {name: (self.directory / f"{name}.parquet").read_bytes() for name in NAMES}

    def files(self) -> list[Path]:
        return sorted(path for path in self.shards.iterdir() if path.suffix in (".parquet", ".json"))


@pytest.fixture
def measurement(model: HookedMoE, corpus: Callable[[], TokenizedCorpus], tmp_path: Path) -> Measurement:
    return Measurement(model, corpus(), tmp_path / "run")


# --- shards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_set_aside_and_measured_again(measurement: Measurement, damage: Any) -> None:
    whole, chance = measurement.measure(), random.Random(0)
    for path in measurement.files()[::6]:
        damage(path, chance)
        there = path.exists()
        assert measurement.measure() == whole
        if damage.__name__ == "delete" and path.suffix == ".json":
            assert measurement.notes == []  # as if it had been killed before
            continue
        (note,) = measurement.notes
        assert path.name[:6] in note
        assert "measured again" in note
        if path.suffix == ".parquet":  # a bit of a record can be one of a table's checksum
            assert path.name in note
            assert path.with_name(f"{path.name}.damaged").exists() == there


def flipped(measurement: Measurement, trials: int) -> int:
    """How many of so many flipped bits were named; each time the tables have to be those of `measure`."""
    whole, chance, named = measurement.measure(), random.Random(2), 0
    kept = {path: path.read_bytes() for path in measurement.files()}
    for _ in range(trials):
        flip_bit(chance.choice(list(kept)), chance)
        assert measurement.measure() == whole
        named += len(measurement.notes)
        assert all(path.read_bytes() == content for path, content in kept.items())
    return named


def test_flipped_bits_anywhere_give_the_same_tables(measurement: Measurement) -> None:
    assert flipped(measurement, 6) >= 5


@pytest.mark.slow
def test_200_flipped_bits_anywhere_give_the_same_tables(measurement: Measurement) -> None:
    assert flipped(measurement, 200) >= 190


def test_every_flipped_bit_of_a_shard_is_noticed(measurement: Measurement) -> None:
    """Without measuring again, which takes most of the time: 200 bits, of footers too."""
    measurement.measure()
    chance, notes = random.Random(3), []
    files = ShardFiles(measurement.shards, {"plan": "p"}, NAMES, notes.append)
    kept = {path: path.read_bytes() for path in measurement.files()}
    for _ in range(200):
        path = chance.choice([path for path in kept if path.suffix == ".parquet"])
        flip_bit(path, chance)
        assert not files.is_whole(path.name[:6])
        assert path.name in notes[-1]
        for damaged in (path, path.with_name(f"{path.name[:6]}.json")):
            damaged.write_bytes(kept[damaged])
        assert files.is_whole(path.name[:6])


def test_shards_of_another_measurement_document_or_table_are_not_taken_up(
    measurement: Measurement, model: HookedMoE, corpus: Callable[[], TokenizedCorpus], tmp_path: Path
) -> None:
    whole = measurement.measure()
    other = Measurement(model, corpus(), tmp_path / "other", plan="q")
    other.measure()
    for path in other.shards.glob("000001.*"):  # of another plan
        shutil.copy(path, measurement.shards)
    assert measurement.measure() == whole
    assert "is of another measurement ({'plan': 'q'}" in measurement.notes[0]
    for path in measurement.shards.glob("000002.*"):  # of another document
        shutil.copy(path, measurement.shards / path.name.replace("000002", "000000"))
    assert measurement.measure() == whole
    assert "unit '000002'" in measurement.notes[0]
    shutil.copy(measurement.shards / "000001.tokens.parquet", measurement.shards / "000001.routing.parquet")
    assert measurement.measure() == whole
    assert "000001.routing.parquet has" in measurement.notes[0]


def test_a_disk_that_damages_what_is_written_ends_the_run(measurement: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardFiles.write

    def spoiled(files: ShardFiles, unit: str, tables: Any, **notes: str) -> None:
        original(files, unit, tables, **notes)
        if unit == "000001":
            flip_bit(files._path(unit, "effects"), random.Random(0))

    monkeypatch.setattr(ShardFiles, "write", spoiled)
    with pytest.raises(OSError, match=r"the shards of 000001 are damaged although they were written 2 times: check the disk"):
        measurement.measure()


# --- the tables of a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(model: HookedMoE, corpus: Callable[[], TokenizedCorpus], tmp_path: Path) -> Callable[..., Run]:
    """Opens the run of one model and corpus; its log goes to the `notes` of the function."""
    notes: list[str] = []

    def open_run(**options: Any) -> Run:
        notes.clear()
        return open_measurement(model, corpus(), results=tmp_path, name="run", log=notes.append, **options)

    open_run.notes = notes  # type: ignore[attr-defined]
    return open_run


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.suffix != ".damaged"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("effects", flip_bit), ("routing", delete), ("documents", cut_short), ("expert_weights", delete)),
        ("token_texts", delete),
    ],
)
def test_a_damaged_table_of_a_finished_run_is_made_again(opened: Any, name: str, damage: Any) -> None:
    with opened() as run:
        run.require("position", SOME, progress=False)
    before, path = contents(run.directory), run.directory / f"{name}.parquet"
    damage(path, random.Random(0))
    with opened() as run:
        assert any(f"{path} " in note and "it is made again when it is asked for" in note for note in opened.notes)
        run.require("position", SOME, progress=False)
    assert contents(run.directory) == before
    with opened() as run:
        assert opened.notes == []
        run.require("position", SOME[:1], progress=False)


def test_a_run_of_before_a_table_was_thought_of_gets_it_when_it_is_opened_again(opened: Any) -> None:
    with opened() as run:
        run.require("position", SOME, progress=False)
    before, path = contents(run.directory), run.directory / "manifest.json"
    (run.directory / "token_texts.parquet").unlink()
    manifest = read_checked_json(path)
    del manifest["files"]["token_texts.parquet"]
    write_checked_json(manifest, path)
    with opened() as run:
        assert run.has("position")
        assert opened.notes == []
    assert contents(run.directory) == before


def test_what_a_lost_table_was_of_is_measured_as_far_as_it_is_known(opened: Any) -> None:
    with opened() as run:
        run.require("position", SOME, progress=False)
        run.require("sequence", SOME, progress=False)
    (run.directory / "effects.parquet").unlink()
    (run.directory / "effects_sequence.parquet").unlink()
    with opened() as run:
        assert not run.has("position")
        run.require("position", [(1, 0)], progress=False)
        assert "with effects.parquet is lost which positions it had" in opened.notes[-1]
        assert run.has("position")
        assert not run.has("sequence")
        assert "effects_sequence.parquet" not in run.known_files()
        assert run.manifest["parts"]["position"]["positions"] == 1


def test_a_part_that_is_being_measured_again_is_not_taken_for_damaged(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the tables of more positions and the manifest, which still lists those of the first."""
    with opened() as run:
        run.require("position", SOME, progress=False)
    original = shards._merge

    def killed(files: Any, units: Any, name: str, *rest: Any) -> None:
        if name == NAMES[-1]:
            raise KeyboardInterrupt
        original(files, units, name, *rest)

    with monkeypatch.context() as patch, opened() as run:
        patch.setattr(shards, "_merge", killed)
        with pytest.raises(KeyboardInterrupt):
            run.require("position", progress=False)
    listed = json.loads((run.directory / "manifest.json").read_text())["files"]["effects.parquet"]
    assert file_record(run.directory / "effects.parquet") != listed
    with opened() as run:
        assert opened.notes == []
        assert not run.has("position")
        monkeypatch.setattr(shards, "measure_document", lambda *_: pytest.fail("measured again"))
        run.require("position", progress=False)
        assert run.has("position")


# --- the manifest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["model"].update(name="another"), "is of another model than this run"),
        (lambda values: values["measurement"].update(layers=[0]), "is of another measurement than this run"),
        (lambda values: values.update(parts=[]), "lacks the objects 'parts' and 'files'"),
        (lambda values: values.pop("files"), "lacks the objects 'parts' and 'files'"),
        (lambda values: values["files"].update({"effects.parquet": 3}), "'files' has no size and checksum for 'effects.parquet'"),
        (lambda values: values["parts"].update(position=3), "part 'position' is no object"),
        (lambda values: values["parts"].update(paper={}), "part 'paper' is none of 'position'"),
        (lambda values: values["parts"]["position"].update(layers="all"), "part 'position' has layers 'all'"),
        (lambda values: values["parts"]["position"].update(positions=None), "part 'position' has positions None"),
        (lambda values: values["parts"]["position"].update(positions=10**400), "part 'position' has positions_sha256 None"),
        (lambda values: values["parts"]["position"].update(orders=[[]]), "part 'position' has orders"),
        (lambda values: values["parts"]["position"].update(seed=1), "part 'position' has seed 1"),
        (lambda values: values["parts"]["position"].update(colour="red"), "part 'position' has 'colour'"),
        (lambda values: values.update(verification={"loss": 1}), "'verification' is no list of named checks"),
        (lambda values: values.update(noise_floor=[1]), "'noise_floor' has no number max_abs_nats"),
    ],
)
def test_a_manifest_of_another_run_or_of_other_types_is_refused(opened: Any, change: Any, message: str) -> None:
    with opened() as run:
        run.require("position", progress=False)
    path = run.directory / "manifest.json"
    values = read_checked_json(path)
    change(values)
    write_checked_json(values, path)
    for _ in range(2):  # and the run is not left locked
        with pytest.raises(ValueError, match=message) as refused:
            opened()
        assert str(path) in str(refused.value)
        assert "remove it, and the same command measures again what it lists" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda values: values["noise_floor"].update(max_abs_nats=1e-3)),
        ("manifest.json", lambda values: values["noise_floor"].update(tokens_per_window=7)),
        ("manifest.json", lambda values: values["verification"].pop()),
        ("manifest.json", lambda values: values.pop("checksum")),
        ("plan.json", lambda values: values["model"].update(revision="main")),
        ("plan.json", lambda values: values.update(format=3.0)),  # which equals 3 in Python
    ],
)
def test_a_plan_or_manifest_that_was_changed_is_refused(opened: Any, name: str, change: Any) -> None:
    with opened() as run:
        run.require("position", progress=False)
    path = run.directory / name
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))  # in another layout, it says the same
    opened().close()
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{name} (was changed since|has no checksum).*remove (it|the directory)"):
        opened()


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"text"', "[" * 100_000, "\ud800"])
def test_a_plan_or_manifest_that_is_no_json_object_is_refused(opened: Any, name: str, text: str) -> None:
    opened().close()
    (opened().directory / name).write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=rf"{name} .*remove (it|the directory)"):
        opened()
