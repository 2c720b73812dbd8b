"""Batches of corrupted runs are traced by an executor as here: the same numbers, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.circuits.tracing import TracingResult, trace_facts
from hooked_moe.circuits.tracing import trace as tracing
from hooked_moe.executors import Executor, ModelWork, Threads, arrival
from tests.support.planted_facts import planted_model, planted_records

FEW: dict[str, Any] = {"min_cases": 8, "n_cases": 10}


class InAnotherProcess(Threads):
    """Hands over what another process would get, as it would get it, but for the model."""

    def __init__(self) -> None:
        self.units: list[int] = []

    def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
        assert isinstance(work, ModelWork)
        loader, task = pickle.loads(pickle.dumps(work.elsewhere()))
        loader.check(work.model)
        for unit in reversed(units):
            task.do(work.model, unit)
            self.units.append(unit)
            yield unit


class Nowhere(Threads):
    """Leaves nothing."""

    def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
        yield from units


@pytest.fixture(scope="module")
def planted() -> HookedMoE:
    model = planted_model()
    model.loaded_from = {"name": "planted"}
    return model


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PATCH_BYTES", 1)  # four runs each


def contents(result: TracingResult, directory: Path) -> dict[str, bytes]:
    result.save(directory)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    "options", [{"corruption": "noise", "draws": 2}, {"corruption": "replace", "positions": "all", "necessity": False}]
)
@pytest.mark.parametrize("executor", [Threads(), InAnotherProcess()], ids=["threads", "another process"])
def test_an_executor_traces_the_same_to_the_byte(
    planted: HookedMoE, tmp_path: Path, executor: Executor, options: dict[str, Any]
) -> None:
    here = trace_facts(planted, planted_records(), **options, **FEW)
    there = trace_facts(planted, planted_records(), executor=executor, directory=tmp_path, **options, **FEW)
    assert not list(tmp_path.iterdir())  # what workers leave is cleared away
    assert contents(here, tmp_path / "here") == contents(there, tmp_path / "there")
    if isinstance(executor, InAnotherProcess):
        assert len(executor.units) > 2


class Dies(InAnotherProcess):
    """After so many units."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
        for unit in super().run(work, units):
            yield unit
            if len(self.units) == self.after:
                raise KeyboardInterrupt


def test_what_was_traced_before_an_interruption_is_not_traced_again(
    planted: HookedMoE, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there, again = tmp_path / "there", InAnotherProcess()
    here = trace_facts(planted, planted_records(), **FEW)
    first = Dies(after=3)
    with pytest.raises(KeyboardInterrupt):
        trace_facts(planted, planted_records(), executor=first, directory=there, **FEW)
    [place] = there.iterdir()
    cut, emptied = (place / f"{unit:06d}.npz" for unit in first.units[:2])
    cut.write_bytes(cut.read_bytes()[:-100])
    emptied.write_bytes(b"")
    (place / ".000000.npz.1.tmp").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):  # asked for something else
        trace_facts(planted, planted_records(), executor=Dies(after=1), directory=there, necessity=False, **FEW)
    assert len(list(there.iterdir())) == 2
    found = trace_facts(planted, planted_records(), executor=again, directory=there, progress=True, **FEW)
    assert set(again.units).isdisjoint(first.units[2:])
    assert set(again.units) >= set(first.units[:2])
    assert contents(here, tmp_path / "here") == contents(found, tmp_path / "found")
    assert "100%" in capfd.readouterr().err
    [left] = there.iterdir()
    assert left != place


def test_two_that_trace_the_same_are_not_in_each_others_way(planted: HookedMoE, tmp_path: Path) -> None:
    class Twice(InAnotherProcess):
        def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
            with pytest.raises(BlockingIOError, match="is being written by another process, which traces the same: wait for it"):
                trace_facts(planted, planted_records(), executor=Threads(), directory=tmp_path, **FEW)
            return super().run(work, units)

    trace_facts(planted, planted_records(), executor=Twice(), directory=tmp_path, **FEW)
    assert not list(tmp_path.iterdir())


def test_numbers_that_do_not_arrive_are_an_error_in_words(
    planted: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.0)
    with pytest.raises(OSError, match=r"a worker has traced batch 0, but .* all workers must see this directory"):
        trace_facts(planted, planted_records(), executor=Nowhere(), directory=tmp_path, **FEW)


def test_other_weights_are_not_traced_elsewhere(planted: HookedMoE, tmp_path: Path) -> None:
    class Edits(InAnotherProcess):
        def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
            with torch.no_grad():
                work.model.embed.W_E[0, 0] += 1e-3
            return super().run(work, units)

    model = planted_model()
    model.loaded_from = {"name": "planted"}
    with pytest.raises(ValueError, match="has loaded other weights by the name"):
        trace_facts(model, planted_records(), executor=Edits(), directory=tmp_path, **FEW)
