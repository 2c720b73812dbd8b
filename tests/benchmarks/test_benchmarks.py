"""The benchmark of loading builds the checkpoint it says it does, and measures what it says. No timing is asserted."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks import loading
from hooked_moe import HookedMoE
from hooked_moe.cli.published_checkpoints import PUBLISHED

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "checkpoint"
    loading.build(loading.deepseek_v2_lite(3, small=True), path)
    return path


def test_the_whole_model_would_have_the_tensors_of_the_published_one() -> None:
    shapes = loading.tensor_shapes(loading.deepseek_v2_lite(27, small=False))
    published = PUBLISHED["deepseek-v2-lite"]
    assert len(shapes) == published.tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == published.parameters


def test_the_checkpoint_is_in_shards_as_on_the_hub(directory: Path) -> None:
    shards = [f"model-{number:05}-of-000004.safetensors" for number in range(1, 5)]
    names = {"config.json", "model.safetensors.index.json", *shards}
    assert {file.name for file in directory.iterdir()} == names
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        with safe_open(directory / shard, "pt") as file:
            found |= dict.fromkeys(file.keys(), shard)
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert found == index["weight_map"]
    assert "model.layers.2.mlp.experts.63.down_proj.weight" in found
    sizes = [(directory / shard).stat().st_size for shard in shards]
    assert max(sizes) < 1.5 * min(sizes)


def test_transformers_loads_the_same_model_from_it(directory: Path) -> None:
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    ours, tokens = HookedMoE.from_pretrained(directory), torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=5e-5, rtol=0)


def test_a_run_gives_a_row_for_every_loader_and_dtype(
    directory: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the processes is real; the rest is measured in this one, which saves seconds."""
    elsewhere = loading.measured_elsewhere

    def measured(directory: Path, loader: str, dtype: str) -> loading.Measured:
        return (elsewhere if loader == "read" else loading.measure)(directory, loader, dtype)

    monkeypatch.setattr(loading, "measured_elsewhere", measured)
    assert loading.main(["--small", "--repeats", "1", "--dir", str(directory)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| reading the bytes",
        "| hooked_moe, bfloat16",
        "| transformers, bfloat16",
        "| hooked_moe, float32",
        "| transformers, float32",
    ]
    assert {row.count("|") for row in rows} == {10}
    assert [row.split(" | ")[4:6] for row in rows[4:8:2]] == [["1.00", "1.00"]] * 2


def test_ratios_are_of_medians() -> None:
    runs = {
        ("read", "bfloat16"): [loading.Measured(seconds, 1.0, 0) for seconds in (2.0, 9.0, 1.0)],
        ("hooked_moe", "bfloat16"): [
            loading.Measured(3.0, cpu, peak * loading.MIB) for cpu, peak in ((9.0, 1), (2.0, 9), (1.0, 5))
        ],
        ("transformers", "bfloat16"): [loading.Measured(6.0, 8.0, 6 * loading.MIB)],
    }
    table = loading.as_table(runs, loading.Sizes(parameters=2 * loading.MIB, tensors=1, largest=loading.MIB)).splitlines()
    assert "largest tensor: 1" in table[0]
    assert table[3] == "| hooked_moe, bfloat16 | 3.00 | 2.00 | 1.50 | 0.50 | 0.25 | 5 | 1.250 | 1 |"
    del runs["transformers", "bfloat16"]
    alone = loading.as_table(runs, loading.Sizes(2 * loading.MIB, 1, loading.MIB)).splitlines()
    assert alone[3] == "| hooked_moe, bfloat16 | 3.00 | 2.00 | 1.50 |  |  | 5 | 1.250 | 1 |"


def test_memory_is_counted_from_before_the_model(directory: Path) -> None:
    held = torch.ones(64 * loading.MIB // 4)
    peak = loading.measure(directory, "hooked_moe", "bfloat16").peak
    assert held.nbytes == 64 * loading.MIB
    assert loading.status("VmHWM") >= loading.status("VmRSS") > held.nbytes
    assert peak < loading.status("VmHWM") - held.nbytes


def test_a_checkpoint_that_is_there_is_used_again(directory: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    loading.build(loading.deepseek_v2_lite(3, small=True), directory)
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == before


REFUSED = {
    "another checkpoint": (["--layers", "4"], "holds something else than this checkpoint"),
    "no layer with experts": (["--layers", "1"], "--layers 2 or more"),
    "no repeats": (["--repeats", "0"], "--repeats 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_named(case: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[case]
    assert loading.main(["--small", "--dir", str(directory), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_short_disk_or_memory_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "free")
    for disk, memory, message in (
        (10**9, 10**12, "1.0 GB free, and the checkpoint takes 3.3 GB: give another --dir"),
        (10**12, 10**9, "1.0 GB of memory are available, and this may take 16.0 GB: give fewer --layers"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=disk: usage(free))
        monkeypatch.setattr(loading, "status", lambda *_, memory=memory: memory)
        assert loading.main(["--dir", str(tmp_path / "new")]) == 1
        assert message in capsys.readouterr().err
        assert not list((tmp_path / "new").iterdir())


def test_a_loader_that_fails_says_why(directory: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(directory, tmp_path / "broken"))
    (broken / "model-00002-of-000004.safetensors").unlink()
    with pytest.raises(OSError, match=r"(?s)loading with hooked_moe in bfloat16 ended with code 1.*model-00002-of-000004"):
        loading.measured_elsewhere(broken, "hooked_moe", "bfloat16")
