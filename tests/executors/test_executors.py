"""Where documents are measured changes nothing in the tables: in threads, in shares of an array, in another process."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.executors import Executor, Work, arrival, in_parallel, ray_cluster
from hooked_moe.loading import from_pretrained
from hooked_moe.measurement import Run, open_measurement, run_directory, shards
from hooked_moe.measurement.shards import PartMeasurement
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.transformer import Transformer
from tests.support.number_text import number_corpus, number_reader

LENGTHS = (12, 9, 14, 7, 11)
Opened = Callable[..., Run]


class InAnotherProcess:
    """An executor that hands over what another process would get, as it would get it, to two workers by turns."""

    def __init__(self) -> None:
        self.units: list[Any] = []

    def places(self, work: Work[Any]) -> int:
        return 2

    def run(self, work: Work[Any], units: Sequence[Any]) -> Iterator[Any]:
        workers = []
        for _ in range(2):
            loader, task = pickle.loads(pickle.dumps(work.elsewhere()))
            workers.append((loader("cpu"), task))
        for number, unit in enumerate(units):
            resource, task = workers[number % 2]
            task.do(resource, unit)
            self.units.append(unit)
            yield unit


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a checkpoint, and where its corpus is."""
    from tests.conftest import random_model

    path = tmp_path_factory.mktemp("executors")
    number_reader(random_model, n_layers=2, n_ctx=64, d_head=8, model_type="olmoe").save_pretrained(path / "model")
    return path


@pytest.fixture
def opened(directory: Path, tmp_path: Path) -> Opened:
    def open_run(where: str, stream: bool = False, edit: Callable[[HookedMoE], Any] = lambda model: None, **options: Any) -> Run:
        model = HookedMoE.from_pretrained(directory / "model", stream=stream)
        edit(model)
        tokenized = TokenizedCorpus(model, number_corpus(directory, LENGTHS), 8)
        return open_measurement(model, tokenized, results=tmp_path / where, name="run", **options)

    return open_run


def tables(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.directory.glob("*.parquet"))}


def measured(run: Run, executor: Executor | None = None) -> dict[str, bytes]:
    with run:
        for part in ("position", "sequence"):
            run.require(part, progress=False, executor=executor)
        return tables(run)


@pytest.mark.parametrize("stream", [False, True])
def test_another_process_measures_the_same_bytes(opened: Opened, stream: bool) -> None:
    executor = InAnotherProcess()
    assert measured(opened("there", stream), executor) == measured(opened("here", stream))
    assert len(executor.units) == 2 * (2 if stream else len(LENGTHS))  # a streamed model is read once for a group


def test_shares_of_an_array_make_the_same_bytes_and_leave_the_same_files(opened: Opened) -> None:
    whole = opened("here")
    expected = measured(whole)
    with opened("array", share=Share(1, 2)) as first, opened("array", share=Share(2, 2)) as second:
        for run in (first, second):
            for part in ("position", "sequence"):
                run.require(part, progress=False)
        assert not list(first.directory.glob("*.parquet"))
        assert not (first.directory / "manifest.json").exists()
        written = {path: path.stat().st_mtime_ns for path in first.directory.rglob("shards/*/*.json")}
        assert len(written) == 2 * len(LENGTHS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PartMeasurement, "measure", lambda *_: pytest.fail("was measured twice"))
            first.require("position", progress=False)
    merging = opened("array")
    assert measured(merging) == expected
    names = [sorted(str(path.relative_to(run.directory)) for path in run.directory.rglob("*")) for run in (whole, merging)]
    assert names[0] == names[1]


def test_what_a_share_lacks_is_measured_by_the_run_that_merges(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("array", share=Share(1, 2)) as run:
        run.require("position", progress=False)
    asked: list[int] = []
    original = shards.measure_document
    monkeypatch.setattr(
        shards,
        "measure_document",
        lambda model, windows, *rest: asked.append(windows[0].document) or original(model, windows, *rest),
    )
    with opened("array") as run:
        run.require("position", progress=False)
    assert asked == [1, 3]


def test_shares_and_whole_runs_keep_each_other_out(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(run_directory, "_SOON", 0.1)
    said: list[str] = []
    with opened("run"), pytest.raises(BlockingIOError, match="by another process, and not a share of it: wait for it"):
        opened("run", share=Share(1, 2), log=said.append)
    assert "is being written by another process: share 1/2 waits for 0.1 s" in said[0]
    with opened("run", share=Share(1, 2)):
        with pytest.raises(BlockingIOError, match="is being written by another process: wait for it"):
            opened("run")
        with pytest.raises(BlockingIOError, match=r"share 1/2 of .* is being measured by another process"):
            opened("run", share=Share(1, 2))
        opened("run", share=Share(2, 2)).close()
    opened("run").close()


def test_a_share_of_another_plan_is_refused(opened: Opened) -> None:
    with opened("run", share=Share(1, 2)), pytest.raises(ValueError, match="begun with another measurement"):
        opened("run", share=Share(2, 2), removal="reroute")


def test_the_record_of_a_run_says_what_it_was_computed_on(opened: Opened) -> None:
    notes: list[str] = []
    with opened("run", log=notes.append) as run:
        run.require("position", progress=False)
        [(place, documents)] = run.manifest["computed_on"]["position"].items()
        assert (documents, torch.backends.cpu.get_cpu_capability() in place) == (len(LENGTHS), True)
    assert not any("measured on" in note for note in notes)


def test_a_mixed_array_is_said_to_be_one(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with monkeypatch.context() as patch, opened("run", share=Share(1, 2)) as run:
        patch.setattr(shards, "computed_on", lambda device: "another machine")
        run.require("position", progress=False)
    with opened("run", log=notes.append) as run:
        run.require("position", progress=False)
        assert run.manifest["computed_on"]["position"]["another machine"] == 3
    assert [note for note in notes if "another machine (3 of them)" in note]


ON_OLDER_HARDWARE = """
import sys, torch
from pathlib import Path
from hooked_moe import HookedMoE
from hooked_moe.corpus import load_corpus
from hooked_moe.measurement import open_measurement
from hooked_moe.measurement.share import Share
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus

torch.set_num_threads(1)
directory, results = map(Path, sys.argv[1:])
model = HookedMoE.from_pretrained(directory / "model")
tokenized = TokenizedCorpus(model, load_corpus(str(directory / "numbers.jsonl")), 8)
with open_measurement(model, tokenized, results=results, name="run", share=Share(1, 2)) as run:
    run.require("position", progress=False)
"""


@pytest.mark.slow
def test_a_mixed_array_agrees_within_a_tolerance(opened: Opened, directory: Path, tmp_path: Path) -> None:
    with opened("alone") as alone:
        alone.require("position", progress=False)
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    }
    subprocess.run(
        [sys.executable, "-c", ON_OLDER_HARDWARE, str(directory), str(tmp_path / "mixed")], env=environment, check=True
    )
    with opened("mixed") as mixed:
        mixed.require("position", progress=False)
        assert len(mixed.manifest["computed_on"]["position"]) == 2
    one, other = (pq.read_table(run.directory / "effects.parquet").to_pandas() for run in (alone, mixed))
    pd.testing.assert_frame_equal(one, other, atol=2e-6, rtol=1e-4)


def test_a_model_made_in_memory_or_with_hooks_cannot_be_loaded_elsewhere(opened: Opened) -> None:
    def forget(model: HookedMoE) -> None:
        model.loaded_from = None

    def hooked(model: HookedMoE) -> None:
        model.add_hook("hook_embed", lambda activation, hook: None)

    for edit, message in ((forget, "made in memory.*save_pretrained"), (hooked, "reset_hooks")):
        with opened(message[:4], edit=edit) as run, pytest.raises(ValueError, match=message):
            run.require("position", progress=False, executor=InAnotherProcess())
        assert not list(run.directory.rglob("*.json")) or not list(run.directory.rglob("shards/*/*.json"))


def test_a_model_changed_after_it_was_loaded_is_not_measured_elsewhere(opened: Opened) -> None:
    def edit(model: HookedMoE) -> None:
        with torch.no_grad():
            model.blocks[0].mlp.experts.W_in[2, 1, 3, 4] += 1e-3

    with opened("run", edit=edit) as run, pytest.raises(ValueError, match="has loaded other weights by the name 'model'"):
        run.require("position", progress=False, executor=InAnotherProcess())


def test_workers_with_other_versions_are_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("run") as run:
        run.plan["versions"]["torch"] = "1.0"
        with pytest.raises(ValueError, match=r"has torch .*, not 1\.0: install there what is installed here"):
            run.require("position", progress=False, executor=InAnotherProcess())


def test_what_a_worker_measured_and_died_before_it_could_say_so_is_not_measured_twice(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DoneAgain(InAnotherProcess):
        """Gives every unit out again, as if its worker had died once the last file was written."""

        def run(self, work: Work[Any], units: Sequence[Any]) -> Iterator[Any]:
            yield from super().run(work, [unit for unit in units for _ in range(2)])

    asked: list[int] = []
    original = shards.measure_document
    monkeypatch.setattr(
        shards,
        "measure_document",
        lambda model, windows, *rest: asked.append(windows[0].document) or original(model, windows, *rest),
    )
    with opened("there") as run:
        run.require("position", progress=False, executor=DoneAgain())
    assert asked == list(range(len(LENGTHS)))


def test_a_full_disk_is_named_and_what_was_measured_before_is_kept(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    measure, write = shards.measure_document, pq.ParquetWriter.write_table

    def filling(*arguments: Any, **options: Any) -> None:
        if len(asked) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    monkeypatch.setattr(
        shards,
        "measure_document",
        lambda model, windows, *rest: asked.append(windows[0].document) or measure(model, windows, *rest),
    )
    with monkeypatch.context() as full, opened("there") as run:
        full.setattr(pq.ParquetWriter, "write_table", filling)
        with pytest.raises(OSError, match="No space left on device"):
            run.require("position", progress=False, executor=InAnotherProcess())
    assert asked == [0, 1, 2, 3]
    asked.clear()
    assert measured(opened("there"), InAnotherProcess()) == measured(opened("here"))
    assert asked[: len(LENGTHS) - 3] == [3, 4]


def test_shards_that_do_not_arrive_are_an_error_in_words(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere(InAnotherProcess):
        def run(self, work: Work[Any], units: Sequence[Any]) -> Iterator[Any]:
            yield from units

    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.1)
    with opened("run") as run, pytest.raises(OSError, match="all workers must see the run's directory at this path"):
        run.require("position", progress=False, executor=Nowhere())


def test_a_model_remembers_how_it_was_loaded(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(directory)
    model = HookedMoE.from_pretrained("model", dtype="bfloat16", stream=True)
    assert model.loaded_from is not None
    monkeypatch.chdir(tmp_path)
    again = from_pretrained(Transformer, **model.loaded_from)
    assert (again.cfg.dtype, again.streams, again.cfg.model_name) == (torch.bfloat16, True, "model")
    shipped = HookedMoE.from_pretrained("tiny-mixtral").loaded_from
    assert shipped is not None
    assert shipped["name"] == "tiny-mixtral"  # which is elsewhere on another machine


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "a/b", "1/2/3", "-1/2", "1/0", "1.5/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"as in 3/8|counted from 1"):
        Share.parse(text)


def test_every_document_is_in_one_share() -> None:
    for of in (1, 2, 3, 7):
        shares = [Share.parse(f"{number}/{of}") for number in range(1, of + 1)]
        assert [sum(document in share for share in shares) for document in range(20)] == [1] * 20


def test_threads_yield_every_unit_and_stop_at_an_error() -> None:
    assert sorted(in_parallel(lambda unit: None, range(7), 3)) == list(range(7))

    def fail(unit: int) -> None:
        time.sleep(0.01)
        raise ValueError(f"unit {unit}")

    with pytest.raises(ValueError, match="unit"):
        list(in_parallel(fail, range(7), 2))


@pytest.mark.parametrize(
    ("number", "each", "room"), [(1.0, 0.2, 5), (1.0, 0.1, 10), (2.0, 0.4, 4), (2.0, 0.3, 6), (4.0, 1.0, 4), (5.0, 2.0, 2)]
)
def test_a_part_of_a_gpu_is_of_a_single_one(number: float, each: float, room: int) -> None:
    assert ray_cluster._room_on_gpus(number, each) == room
