"""What the executor does with workers that are done, die, meet full disks or fail, in any order: on a cluster that is none."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hooked_moe.executors import PlainWork, RayExecutor, ray_cluster, ray_executor
from tests.support.fake_ray import Died, fake_ray

Unit = tuple[str, int]
SEEDS = range(12)


class Noted:
    """A task that counts how often each unit was begun; the first word of a unit says what comes of it."""

    def __init__(self) -> None:
        self.begun: Counter[Unit] = Counter()

    def do(self, resource: Any, unit: Unit) -> None:
        self.begun[unit] += 1
        kind, first = unit[0], self.begun[unit] == 1
        if kind == "dies" or (kind == "dies once" and first):
            raise Died
        if kind == "disk is full" and first:
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind == "fails":
            raise ValueError(f"unit {unit[1]} cannot be done")


@pytest.fixture(params=SEEDS)
def notes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of an executor's log, on a cluster of four processors."""
    ray = fake_ray(request.param)
    for module in (ray_cluster, ray_executor):
        monkeypatch.setattr(module, "import_ray", lambda: ray)
    return []


def done(task: Noted, units: list[Unit], notes: list[str], **options: Any) -> list[Unit]:
    return list(RayExecutor(workers=2, cpus=1, log=notes.append, **options).run(PlainWork(task), units))


def units(*special: Unit) -> list[Unit]:
    return [("is done", number) for number in range(6)] + list(special) + [("is done", number) for number in range(6, 9)]


def test_every_unit_is_done_once(notes: list[str]) -> None:
    task = Noted()
    assert sorted(done(task, units(), notes)) == sorted(units())
    assert task.begun == Counter(units())
    assert notes == []


def test_a_dead_worker_costs_the_unit_that_it_was_at(notes: list[str]) -> None:
    task, asked = Noted(), units(("dies once", 1), ("dies once", 2))
    assert sorted(done(task, asked, notes)) == sorted(asked)
    assert task.begun == Counter(asked) + Counter([("dies once", 1), ("dies once", 2)])
    assert ["has died; another does what it was at" in note for note in notes] == [True, True]


def test_a_unit_that_kills_its_workers_ends_the_run(notes: list[str]) -> None:
    task = Noted()
    with pytest.raises(
        ChildProcessError, match=r"while it was at \('dies', 0\), 3 times; the last time: the actor died of something\. If memory"
    ):
        done(task, units(("dies", 0)), notes)
    assert task.begun["dies", 0] == 3
    assert max(times for unit, times in task.begun.items() if unit[0] == "is done") == 1


def test_a_full_disk_sets_its_worker_aside_and_a_second_one_is_an_error(notes: list[str]) -> None:
    task, asked = Noted(), units(("disk is full", 0))
    assert sorted(done(task, asked, notes)) == sorted(asked)
    assert task.begun == Counter(asked) + Counter([("disk is full", 0)])
    assert ["is set aside: [Errno 28] No space left on device" in note for note in notes] == [True]
    with pytest.raises(OSError, match="No space left on device"):
        done(Noted(), units(("disk is full", 0), ("disk is full", 1)), [])


def test_any_other_error_is_raised_as_it_was(notes: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^unit 0 cannot be done$"):
        done(Noted(), units(("fails", 0)), notes)


def test_at_most_two_units_are_with_a_worker(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = ray_cluster.Pool.next_event

    def counted(pool: ray_cluster.Pool) -> ray_cluster.Event:
        seen.extend(len(worker.units) for worker in pool.workers)
        return original(pool)

    monkeypatch.setattr(ray_cluster.Pool, "next_event", counted)
    done(Noted(), units(), notes)
    assert max(seen) == 2


def test_workers_that_have_loaded_the_same_are_used_again(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    original = ray_cluster.Pool.start
    monkeypatch.setattr(ray_cluster.Pool, "start", lambda pool: started.append(1) or original(pool))
    executor = RayExecutor(workers=2, cpus=1)
    for _ in range(2):
        assert len(list(executor.run(PlainWork(Noted()), units()))) == len(units())
    assert len(started) == 2


def test_no_units_start_no_workers_and_too_large_ones_are_refused(notes: list[str]) -> None:
    assert done(Noted(), [], notes) == []
    with pytest.raises(ValueError, match="no machine of the Ray cluster has 9 CPUs and 0 GPUs for a worker: give it fewer"):
        list(RayExecutor(cpus=9).run(PlainWork(Noted()), units()))
    assert RayExecutor(cpus=1).places(PlainWork(Noted())) == 4


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str | None]:
    """The addresses that ray is asked to join."""
    asked: list[str | None] = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda address, **_: asked.append(address))
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: ray)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_auto_is_the_cluster_that_runs_here_or_this_machine_alone(
    joined: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    assert ray_cluster.connect("auto")
    (tmp_path / "ray").mkdir()
    note = tmp_path / "ray" / "ray_current_cluster"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        note.write_text(address)
        ray_cluster.connect("auto")
        ray_cluster.connect(address)
    ray_cluster.connect("auto")  # the note of a cluster that was killed
    assert joined == [None, address, address, "local"]
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in ("auto", address):
        with pytest.raises(ConnectionError, match=rf"no Ray cluster can be joined at '{address}' \(nothing answers there\)"):
            ray_cluster.connect(given)
