"""On a Ray cluster: the bytes of a run in threads, whoever is killed meanwhile. One quick test; the others are slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hooked_moe import HookedMoE
from hooked_moe.circuits.tracing import trace as tracing
from hooked_moe.circuits.tracing import trace_facts
from hooked_moe.corpus import load_facts
from hooked_moe.executors import Executor, PlainWork, RayExecutor, ray_cluster
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.pruned_losses import PrunedLosses
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from tests.support.file_units import Files
from tests.support.number_text import number_corpus, number_reader

ray = pytest.importorskip("ray")

LENGTHS = (12, 9, 14, 7, 11, 10)
Opened = Callable[..., Run]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two machines of two processors each, which are both this one."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([] if before is None else [before])])
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    machines.add_node(num_cpus=2)
    ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    machines.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import random_model

    path = tmp_path_factory.mktemp("ray")
    number_reader(random_model, n_layers=2, n_ctx=64, d_head=8, model_type="olmoe").save_pretrained(path / "model")
    return path


@pytest.fixture
def opened(directory: Path, tmp_path: Path) -> Opened:
    def open_run(where: str, **options: Any) -> Run:
        model = HookedMoE.from_pretrained(directory / "model", stream=options.pop("stream", False))
        tokenized = TokenizedCorpus(model, number_corpus(directory, LENGTHS), 8)
        return open_measurement(model, tokenized, results=tmp_path / where, name="run", **options)

    return open_run


def measured(run: Run, executor: Executor | None = None) -> dict[str, bytes]:
    with run:
        for part in ("position", "sequence"):
            run.require(part, progress=False, executor=executor)
        return {path.name: path.read_bytes() for path in sorted(run.directory.glob("*.parquet"))}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_two_machines_measure_the_bytes_of_threads(cluster: None, opened: Opened, stream: bool) -> None:
    executor = RayExecutor(workers=2)
    assert measured(opened("there", stream=stream), executor) == measured(opened("here", stream=stream))


@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_was_at(cluster: None, tmp_path: Path) -> None:
    notes: list[str] = []
    units = [("slow", f"{number}") for number in range(6)] + [("dies once", "killed")] + [("slow", f"{n}") for n in range(6, 10)]
    executor = RayExecutor(workers=2, log=notes.append)
    assert sorted(executor.run(PlainWork(Files(tmp_path)), units)) == sorted(units)
    attempts = {name: len((tmp_path / f"{name}.attempts").read_text().splitlines()) for _, name in units}
    assert attempts == {name: 1 + (name == "killed") for _, name in units}
    assert [note for note in notes if "has died; another does what it was at" in note]


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_ends_the_run_in_words(cluster: None, tmp_path: Path) -> None:
    units = [("slow", "a"), ("dies", "b"), ("slow", "c")]
    with pytest.raises(
        ChildProcessError, match=r"a worker died while it was at \('dies', 'b'\), 2 times.*fewer workers a machine"
    ):
        list(RayExecutor(workers=2, attempts=2).run(PlainWork(Files(tmp_path)), units))


@pytest.mark.slow
def test_a_worker_with_a_full_disk_is_set_aside(cluster: None, tmp_path: Path) -> None:
    notes: list[str] = []
    units = [("slow", "a"), ("full disk", "b"), *(("slow", f"{n}") for n in range(5))]
    assert sorted(RayExecutor(workers=2, log=notes.append).run(PlainWork(Files(tmp_path)), units)) == sorted(units)
    assert [note for note in notes if "is set aside" in note and "No space left" in note]
    disks = [("all disks are full", "x"), ("slow", "y"), ("slow", "z")]
    with pytest.raises(OSError, match="No space left"):  # where all are full, there is none to take over
        list(RayExecutor(workers=2).run(PlainWork(Files(tmp_path)), disks))


@pytest.mark.slow
def test_an_error_ends_the_run_and_is_the_workers_own(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^b cannot be done$"):
        list(RayExecutor(workers=2).run(PlainWork(Files(tmp_path)), [("slow", "a"), ("fails", "b"), ("slow", "c")]))
    assert not list(RayExecutor(workers=2).run(PlainWork(Files(tmp_path)), []))


@pytest.mark.slow
def test_workers_that_fit_on_no_machine_are_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no machine of the Ray cluster has 3 CPUs and 0 GPUs"):
        list(RayExecutor(cpus=3).run(PlainWork(Files(tmp_path)), [("slow", "a")]))


@pytest.mark.slow
def test_a_worker_killed_amid_a_measurement_changes_no_byte(
    cluster: None, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killing(RayExecutor):
        """Kills a worker once the first document is measured."""

        def run(self, work: Any, units: Sequence[Any]) -> Iterator[Any]:
            for number, unit in enumerate(super().run(work, units)):
                if number == 0:
                    assert self._pool is not None
                    os.kill(ray.get(self._pool.workers[-1].actor.__ray_call__.remote(lambda worker: os.getpid())), signal.SIGKILL)
                yield unit

    assert measured(opened("there"), Killing(workers=2)) == measured(opened("here"))


@pytest.mark.slow
def test_pruned_models_are_measured_there_as_here(cluster: None, opened: Opened, tmp_path: Path) -> None:
    prunings: list[dict[int, list[int]]] = [{}, {0: [1, 2]}, {1: [0]}, {0: [3], 1: [2, 4]}]
    with opened("run") as run:
        files = []
        for where, executor in (("there", RayExecutor(workers=2)), ("here", None)):
            losses = PrunedLosses(run.model, run.tokenized, [1, 3, 5], 8, tmp_path / where, run.plan)
            losses.measure(prunings, executor)
            files.append({path.name: path.read_bytes() for path in sorted((tmp_path / where).iterdir())})
    assert files[0] == files[1]
    assert len(files[0]) == 2 * len(prunings)


@pytest.mark.slow
def test_facts_are_traced_there_as_here(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PATCH_BYTES", 1)  # four runs each
    model = HookedMoE.from_pretrained("tiny-olmoe-facts")
    records = [record for record in load_facts("embedded") if record.split == "taught"]
    options: dict[str, Any] = {"n_cases": 10, "min_cases": 4, "corruption": "noise", "readouts": ["logit_difference"]}
    files = []
    for where, executor in (("there", RayExecutor(workers=2)), ("here", None)):
        trace_facts(model, records, executor=executor, directory=tmp_path, **options).save(tmp_path / where)
        files.append({path.name: path.read_bytes() for path in sorted((tmp_path / where).iterdir())})
    assert files[0] == files[1]


DRIVER = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from hooked_moe import HookedMoE
from hooked_moe.executors import RayExecutor
from hooked_moe.measurement import open_measurement
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.corpus import load_corpus

class Killed(RayExecutor):
    def run(self, work, units):
        for unit in super().run(work, units):
            os.kill(os.getpid(), signal.SIGKILL)

directory, results = map(Path, sys.argv[1:])
model = HookedMoE.from_pretrained(directory / "model")
tokenized = TokenizedCorpus(model, load_corpus(str(directory / "numbers.jsonl")), 8)
with open_measurement(model, tokenized, results=results, name="run") as run:
    run.require("position", progress=False, executor=Killed(workers=2))
"""


@pytest.mark.slow
def test_a_killed_driver_resumes_and_measures_nothing_twice(
    cluster: None, opened: Opened, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray.get_runtime_context().gcs_address
    number_corpus(directory, LENGTHS)
    environment = os.environ | {"RAY_ADDRESS": address}
    child = subprocess.run([sys.executable, "-c", DRIVER, str(directory), str(tmp_path / "there")], env=environment)
    assert child.returncode == -signal.SIGKILL
    with opened("there") as run:
        time.sleep(3)  # its workers end, once the cluster has seen that their driver is gone
        before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("shards/*/*.json")}
        assert before
        touched: list[Path] = []
        gone = "hooked_moe.measurement.run.remove_shards_of_part"
        monkeypatch.setattr(gone, lambda shards, part: touched.extend(shards.rglob("*/*.json")))
        run.require("position", progress=False, executor=RayExecutor(workers=2))
        assert len(touched) == len(LENGTHS)
        assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    with opened("here") as whole:
        whole.require("position", progress=False)
    for name in ("effects", "tokens", "routing", "expert_weights", "documents"):
        assert (run.directory / f"{name}.parquet").read_bytes() == (whole.directory / f"{name}.parquet").read_bytes()


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ray_cluster.MissingRayError, match=r"pip install 'hooked_moe\[cluster\]'"):
        RayExecutor()


@pytest.mark.parametrize("options", [{"workers": 0}, {"cpus": 0}, {"gpus": -1}, {"gpus": float("nan")}, {"attempts": 0}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be a"):
        RayExecutor(**options)
